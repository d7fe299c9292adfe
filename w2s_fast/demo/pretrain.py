"""Next-token training of a small model on synthetic reviews, on a CPU."""

import itertools
import math
import random
from collections.abc import Callable, Iterator

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from w2s_fast.demo.reviews import Review, reviews

Advance = Callable[[str], None]  # told after every step: a note for the progress bar
SORTED_TOGETHER = 16  # batches


def review_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """One row of token ids a review: BOS, the review, EOS."""
    eos = tokenizer.eos_token_id
    return [[eos, *ids, eos] for ids in tokenizer(texts)["input_ids"]]


def pad_rows(rows: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [rows, length]; the labels are -100 on the padding."""
    # few different widths: each new matrix shape costs the CPU's libraries a set-up
    width = -(-max(map(len, rows)) // 16) * 16
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, ids.masked_fill(torch.arange(width) >= lengths[:, None], -100)


def training_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, batch: int
) -> Iterator[list[list[int]]]:
    """Batches of rows without end, no review twice; rows of like length stand together.

    Every second row, by chance, begins without BOS, so that prompts of both kinds are known.
    """
    rng = random.Random(seed)
    stream = reviews(seed)
    while True:
        texts = [review.text for review in itertools.islice(stream, SORTED_TOGETHER * batch)]
        rows = [row[rng.randrange(2) :] for row in review_rows(tokenizer, texts)]
        rows.sort(key=len)  # saves a third of the padding
        batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        rng.shuffle(batches)
        yield from batches


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a hundredth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    batch: int,
    peak_lr: float,
    advance: Advance,
) -> None:
    """Trains `model` in place, on `batch` fresh reviews at every step; `seed` decides which."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.05
    )
    model.train()
    batches = itertools.islice(training_batches(tokenizer, seed, batch), steps)
    for step, rows in enumerate(batches):
        ids, labels = pad_rows(rows, tokenizer.eos_token_id)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        # bf16 is several times faster than fp32 on CPUs with AMX; the weights stay fp32
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        advance(f"loss {loss.item():.3f}")
    model.train(False)


@torch.no_grad()
def token_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, written: list[Review]
) -> float:
    """Mean negative log-likelihood per token after the prompt, EOS included, in nats.

    The prompt does not count: it names a title, and knowing the training titles well makes the
    held-out ones only less likely.
    """
    total, count = 0.0, 0
    for start in range(0, len(written), 128):
        part = written[start : start + 128]
        rows = review_rows(tokenizer, [review.text for review in part])
        ids, labels = pad_rows(rows, tokenizer.eos_token_id)
        prompts = tokenizer([review.prompt for review in part])["input_ids"]
        for row, prompt in enumerate(prompts):
            labels[row, : 1 + len(prompt)] = -100  # BOS and the prompt
        tokens = int((labels != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    return total / count
