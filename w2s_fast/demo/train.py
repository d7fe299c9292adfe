"""Makes the bundled demo models from nothing: `python -m w2s_fast.demo.train --out DIR`.

The base and the untuned guide are pre-trained on the same synthetic reviews; the tuned guide is
the untuned one after DPO on its own samples, ranked by the gold reward. No network is needed.
"""

import copy
import itertools
import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tokenizers
import torch
import transformers
import typer
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from w2s_fast.demo.dpo import DPOSettings, preference_pairs, train_dpo
from w2s_fast.demo.reviews import Review, reviews

EOS = "<|endoftext|>"
MAX_POSITIONS = 512
Advance = Callable[[str], None]  # told after every step: a note for the progress bar


@dataclass(frozen=True)
class Dims:
    """Sizes of one Llama-type model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the models become."""

    seed: int = 0
    vocab_size: int = 1024
    tokenizer_reviews: int = 20_000
    base: Dims = field(default_factory=lambda: Dims(256, 5, 4, 2, 704))
    guide: Dims = field(default_factory=lambda: Dims(128, 2, 4, 2, 256))
    base_steps: int = 2500
    guide_steps: int = 1500
    batch: int = 32  # reviews a step
    base_lr: float = 2e-3
    guide_lr: float = 4e-3
    eval_reviews: int = 512
    dpo: DPOSettings = field(default_factory=DPOSettings)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; one special token, used as BOS, EOS and padding, and never added by itself.

    The bytes make up 256 of the `vocab_size` entries, so any text can be encoded.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_POSITIONS,
    )


def make_model(dims: Dims, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model with tied embeddings, initialised from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dims.hidden,
        intermediate_size=dims.mlp,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=dims.hidden**-0.5 / 2,
    )
    # on a CPU and rows this short, eager attention's backward is faster than sdpa's
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def make_batch(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], drop_bos: random.Random | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, length] (BOS, review, EOS, padding) and labels, -100 on the padding.

    With `drop_bos` every second row, by chance, begins without BOS: prompts of both kinds occur.
    """
    eos = tokenizer.eos_token_id
    rows = [[eos, *ids, eos] for ids in tokenizer(texts)["input_ids"]]
    if drop_bos is not None:
        rows = [row[drop_bos.randrange(2) :] for row in rows]
    # few different widths: each new matrix shape costs the CPU's libraries a set-up
    width = -(-max(map(len, rows)) // 16) * 16
    ids = torch.tensor([row + [eos] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    labels = ids.masked_fill(torch.arange(width) >= lengths[:, None], -100)
    return ids, labels


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a hundredth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stream: Iterator[Review],
    steps: int,
    batch: int,
    peak_lr: float,
    seed: int,
    advance: Advance,
) -> None:
    """Next-token training on fresh reviews at every step; changes `model` in place."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.05
    )
    drop_bos = random.Random(seed)
    model.train()
    for step in range(steps):
        texts = [review.text for review in itertools.islice(stream, batch)]
        ids, labels = make_batch(tokenizer, texts, drop_bos)
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
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> float:
    """Mean negative log-likelihood per token, EOS included, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(texts), 128):
        ids, labels = make_batch(tokenizer, texts[start : start + 128])
        tokens = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    return total / count


def round_weights(model: LlamaForCausalLM) -> None:
    """Rounds to fp16, the stored precision, so that what follows sees the stored model."""
    for weight in model.parameters():
        weight.data = weight.data.half().float()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a Hugging Face folder in fp16, its tokenizer included."""
    stored = copy.deepcopy(model)
    stored.half()  # type: ignore[no-untyped-call]
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(recipe: Recipe, out: Path, progress: Progress) -> dict[str, float]:
    """Makes all the models, writes them under `out`, and returns what was measured."""
    begin = time.perf_counter()
    torch.manual_seed(recipe.seed)

    def task(name: str, steps: int) -> Advance:
        bar = progress.add_task(name, total=steps)
        return lambda note: progress.update(bar, advance=1, description=f"{name}  {note}")

    # every use of reviews has its own stream; the held-out titles are only used to measure
    streams = [recipe.seed * 1000 + part for part in range(4)]
    texts = (review.text for review in reviews(streams[0]))
    tokenizer = train_tokenizer(
        itertools.islice(texts, recipe.tokenizer_reviews), recipe.vocab_size
    )
    tokenizer.save_pretrained(out / "tokenizer")
    fresh = itertools.islice(reviews(streams[3], held_out=True), recipe.eval_reviews)
    eval_texts = [review.text for review in fresh]

    measured: dict[str, float] = {}
    models: dict[str, LlamaForCausalLM] = {}
    for name, dims, steps, lr in (
        ("untuned", recipe.guide, recipe.guide_steps, recipe.guide_lr),
        ("base", recipe.base, recipe.base_steps, recipe.base_lr),
    ):
        model = models[name] = make_model(dims, tokenizer)
        advance = task(name, steps)
        # both models read the same reviews, in the same order
        stream = reviews(streams[1])
        pretrain(model, tokenizer, stream, steps, recipe.batch, lr, streams[1], advance)
        round_weights(model)
        save(model, tokenizer, out / name)
        measured[f"{name} parameters"] = model.num_parameters()
        measured[f"{name} loss on held-out reviews (nats a token)"] = token_loss(
            model, tokenizer, eval_texts
        )

    settings = recipe.dpo
    prompts = [review.prompt for review in itertools.islice(reviews(streams[2]), settings.prompts)]
    pairs = preference_pairs(
        models["untuned"], tokenizer, prompts, settings, task("sampling pairs", settings.batches)
    )
    tuned, dpo_measured = train_dpo(
        models["untuned"], pairs, settings, recipe.seed, task("tuned", settings.steps(len(pairs)))
    )
    save(tuned, tokenizer, out / "tuned")
    measured.update(dpo_measured)
    measured["minutes"] = (time.perf_counter() - begin) / 60
    return measured


def write_card(recipe: Recipe, measured: dict[str, float], out: Path) -> None:
    """CARD.md: how the models were made, and the numbers measured while making them."""
    settings = {key: value for key, value in asdict(recipe).items() if key != "dpo"}
    lines = [
        "# The demo models",
        "",
        "Made by `python -m w2s_fast.demo.train`; this page is written by the same run.",
        "",
        "- **Data.** Synthetic film, book and restaurant reviews (`reviews.py`), each sentence",
        "  positive, negative or neutral by chance. Titles of the held-out prompts are not in it.",
        "- **base**, **untuned**. Llama-type models trained on next tokens of the same reviews.",
        "- **tuned**. `untuned` after DPO on pairs of its own samples, ranked by the gold reward",
        "  (`gold.py`: VADER's compound score, averaged over sentences).",
        "- **Storage.** fp16 safetensors; one byte-level BPE tokenizer, in every folder.",
        "- **Prompts.** Plain text such as `Last night we saw Silver Bridge`: no template, no",
        "  space at the end. Sentiment in English film, book and restaurant reviews of this one",
        "  style is all that these models know; they are for trying the engine, not for use.",
        "",
        "## Recipe",
        "",
        *(f"- {key}: {value}" for key, value in settings.items()),
        *(f"- DPO {key}: {value}" for key, value in asdict(recipe.dpo).items()),
        "",
        "## Measured",
        "",
        *(
            f"- {key}: {value:,.0f}" if value == int(value) else f"- {key}: {value:.3f}"
            for key, value in measured.items()
        ),
        f"- with torch {torch.__version__}, transformers {transformers.__version__},"
        f" {torch.get_num_threads()} threads, {platform.machine()}",
        "",
    ]
    (out / "CARD.md").write_text("\n".join(lines))


def main(
    out: Annotated[Path, typer.Option(help="folder that the models are written to")],
    seed: Annotated[int, typer.Option(help="decides data, initial weights and samples")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train the demo's tokenizer, base, untuned and tuned models."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=seed)
    with Progress() as progress:
        measured = train(recipe, out, progress)
    write_card(recipe, measured, out)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
