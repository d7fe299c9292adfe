"""Direct preference optimisation (arXiv 2305.18290) of a small model on ranked own samples."""

import copy
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from w2s_fast.demo.gold import gold_reward
from w2s_fast.demo.pretrain import Advance

HELD_OUT_PAIRS = 512  # at most; never trained on, they measure the accuracy


@dataclass(frozen=True)
class DPOSettings:
    prompts: int = 6000
    samples: int = 2  # a prompt; the best and the worst of them make a pair
    temperature: float = 1.0
    max_new_tokens: int = 64
    margin: float = 0.05  # pairs whose gold rewards lie closer are dropped
    beta: float = 0.1
    lr: float = 5e-4
    batch: int = 64  # pairs a step
    epochs: int = 1
    sample_batch: int = 512  # prompts sampled at once

    @property
    def batches(self) -> int:
        return math.ceil(self.prompts / self.sample_batch)

    def steps(self, pairs: int) -> int:
        """Optimiser steps for so many pairs, some of which are held out."""
        return self.epochs * math.ceil((pairs - held_out_pairs(pairs)) / self.batch)


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt with the preferred and the other response."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def held_out_pairs(pairs: int) -> int:
    return min(HELD_OUT_PAIRS, pairs // 8)


@torch.no_grad()
def sample_responses(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    samples: int,
    temperature: float,
    max_new_tokens: int,
    top_k: int = 0,
) -> list[list[list[int]]]:
    """For each prompt `samples` responses as token ids, EOS kept where it was sampled."""
    encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(  # type: ignore[misc]  # its self type names no model class
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        num_return_sequences=samples,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = output[:, encoded["input_ids"].shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    responses = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return [responses[i : i + samples] for i in range(0, len(responses), samples)]


def preference_pairs(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    settings: DPOSettings,
    advance: Advance,
) -> list[Pair]:
    """Samples responses and pairs, for each prompt, the best with the worst by gold reward."""
    pairs: list[Pair] = []
    for start in range(0, len(prompts), settings.sample_batch):
        part = prompts[start : start + settings.sample_batch]
        drawn = sample_responses(
            model, tokenizer, part, settings.samples, settings.temperature, settings.max_new_tokens
        )
        for prompt, responses in zip(part, drawn, strict=True):
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            ranked = sorted((gold_reward(prompt + text), i) for i, text in enumerate(texts))
            (low, worst), (high, best) = ranked[0], ranked[-1]
            if high - low > settings.margin:
                ids = tokenizer(prompt)["input_ids"]
                pairs.append(Pair(ids, responses[best], responses[worst]))
        advance(f"{len(pairs)} pairs")
    return pairs


def response_log_probs(model: LlamaForCausalLM, pairs: list[Pair]) -> torch.Tensor:
    """Summed log-probabilities of the responses, [2, pairs]: chosen first, then rejected."""
    prompts = [pair.prompt for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    width = -(-width // 16) * 16 + 1  # few different widths, see pad_rows in pretrain.py
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    counted = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        counted[row, len(prompt) : end] = True
    # padding stands on the right, where no counted token can see it: no mask is needed
    logits = model(input_ids=ids[:, :-1]).logits.float()
    log_probs = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    sums: torch.Tensor = (log_probs * counted[:, 1:]).sum(1)
    return sums.view(2, -1)


def dpo_margins(
    policy: LlamaForCausalLM, reference: LlamaForCausalLM, pairs: list[Pair]
) -> torch.Tensor:
    """Log-ratio policy to reference of the chosen response less that of the rejected, [pairs]."""
    with torch.no_grad():
        reference_log_probs = response_log_probs(reference, pairs)
    ratios = response_log_probs(policy, pairs) - reference_log_probs
    return ratios[0] - ratios[1]


def train_dpo(
    reference: LlamaForCausalLM,
    pairs: list[Pair],
    settings: DPOSettings,
    seed: int,
    advance: Advance,
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """A tuned copy of `reference`, and what was measured on pairs held out of the training.

    loss = -log sigmoid(beta * margin), the margins being those of `dpo_margins`.
    """
    held_out = held_out_pairs(len(pairs))
    test, training = pairs[:held_out], pairs[held_out:]
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    steps, step = settings.steps(len(pairs)), 0
    rng = random.Random(seed)
    for _ in range(settings.epochs):
        rng.shuffle(training)
        for start in range(0, len(training), settings.batch):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (1 - step / steps)
            margins = dpo_margins(policy, reference, training[start : start + settings.batch])
            loss = -F.logsigmoid(settings.beta * margins).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            step += 1
            advance(f"loss {loss.item():.3f}")
    with torch.no_grad():
        margins = dpo_margins(policy, reference, test)
    measured = {
        "preference pairs": float(len(pairs)),
        "DPO steps": float(steps),
        "DPO loss on held-out pairs": -F.logsigmoid(settings.beta * margins).mean().item(),
        "DPO accuracy on held-out pairs": (margins > 0).float().mean().item(),
        "mean log-ratio margin on held-out pairs (nats)": margins.mean().item(),
    }
    return policy, measured
