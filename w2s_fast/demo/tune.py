"""Makes the bundled adapter: `python -m w2s_fast.demo.tune --out DIR`.

LoRA on SmolLM2-135M-Instruct, preferring positive film reviews: direct preference optimisation on
the model's own samples, ranked by the demo's gold reward. It needs that model (`w2s-fast
fetch-models`) and peft.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress

from w2s_fast import Engine, SearchParams
from w2s_fast.demo.beginnings import training_beginnings
from w2s_fast.demo.card import recipe_and_numbers
from w2s_fast.demo.dpo import Pair, response_log_probs
from w2s_fast.demo.gold import gold_reward
from w2s_fast.models import load_model
from w2s_fast.real import SMOLLM2, real_model_path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the adapter's config says it goes with


@dataclass(frozen=True)
class Recipe:
    """All that decides what the adapter becomes."""

    seed: int = 0
    held_out_prompts: int = 8  # of the training prompts: their pairs measure, and train nothing
    samples: int = 12  # a prompt
    temperature: float = 1.0
    max_new_tokens: int = 40
    pairs: int = (
        3  # a prompt: its best sample with its worst, its second with the last but one, ...
    )
    margin: float = 0.2  # pairs whose gold rewards lie closer are dropped
    rank: int = 4
    alpha: int = 8
    beta: float = 0.1
    lr: float = 5e-4  # its peak
    warmup: int = 5  # steps
    batch: int = 4  # pairs a step
    epochs: int = 2


def preference_pairs(engine: Engine, prompts: list[str], recipe: Recipe) -> list[list[Pair]]:
    """For each prompt, pairs of its own samples."""
    params = SearchParams(
        method="sample",
        n=recipe.samples,
        temperature=recipe.temperature,
        top_k=0,
        max_new_tokens=recipe.max_new_tokens,
        seed=recipe.seed,
    )
    tokenizer: Any = engine.tokenizer
    found = []
    for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True):
        ranked = sorted(
            ((gold_reward(prompt + (h.text or "")), h.token_ids) for h in result.hypotheses),
            key=lambda each: -each[0],
        )
        ids = tokenizer(prompt)["input_ids"]
        found.append(
            [
                Pair(ids, chosen, rejected)
                for (high, chosen), (low, rejected) in zip(
                    ranked[: recipe.pairs], reversed(ranked), strict=False
                )
                if high - low > recipe.margin
            ]
        )
    return found


def in_batches(pairs: list[Pair], size: int) -> list[list[Pair]]:
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def margins(model: Any, batch: list[Pair], reference: torch.Tensor) -> torch.Tensor:
    """Log-ratio of the chosen response to the reference less that of the rejected one, [pairs].

    ``reference``: the log-probs of both without the adapter, [2, pairs].
    """
    ratios = response_log_probs(model, batch) - reference
    return ratios[0] - ratios[1]


@torch.no_grad()
def without_adapter(model: Any, batches: list[list[Pair]]) -> list[torch.Tensor]:
    """The log-probs of each batch, [2, pairs]."""
    with model.disable_adapter():
        return [response_log_probs(model, batch) for batch in batches]


def train(model: Any, pairs: list[Pair], recipe: Recipe, progress: Progress) -> int:
    """Trains the adapter in place; how many steps it took. Loss: -log sigmoid(beta * margin)."""
    rng = random.Random(recipe.seed)
    rng.shuffle(pairs)
    batches = in_batches(pairs, recipe.batch)
    bar = progress.add_task("training", total=recipe.epochs * len(batches))
    reference = without_adapter(model, batches)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    steps, step = recipe.epochs * len(batches), 0
    for _ in range(recipe.epochs):
        for b in rng.sample(range(len(batches)), len(batches)):
            rate = min(1.0, (step + 1) / recipe.warmup) * (1 - step / steps)
            optimizer.param_groups[0]["lr"] = recipe.lr * rate
            loss = -F.logsigmoid(recipe.beta * margins(model, batches[b], reference[b])).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            progress.update(bar, advance=1, description=f"training, loss {loss.item():.3f}")
            if step % 10 == 0 and not progress.console.is_terminal:
                progress.console.print(f"step {step} of {steps}, loss {loss.item():.3f}")
    return steps


@torch.no_grad()
def measured_on(model: Any, pairs: list[Pair], recipe: Recipe) -> dict[str, float]:
    batches = in_batches(pairs, recipe.batch)
    references = without_adapter(model, batches)
    found = torch.cat([margins(model, *each) for each in zip(batches, references, strict=True)])
    return {
        "held-out pairs": len(pairs),
        "loss on held-out pairs": -F.logsigmoid(recipe.beta * found).mean().item(),
        "accuracy on held-out pairs": (found > 0).float().mean().item(),
        "mean log-ratio margin on held-out pairs (nats)": found.mean().item(),
    }


def make_adapter(untuned: Path, recipe: Recipe, out: Path, progress: Progress) -> dict[str, float]:
    """Writes the adapter as PEFT does, in bfloat16, and returns what was measured."""
    start = time.perf_counter()
    prompts = training_beginnings()
    grouped = preference_pairs(Engine(base=untuned, device="cpu"), prompts, recipe)
    split = len(grouped) - recipe.held_out_prompts
    training = [pair for pairs in grouped[:split] for pair in pairs]
    test = [pair for pairs in grouped[split:] for pair in pairs]
    sampled = time.perf_counter()
    progress.console.print(f"{len(training)} and {len(test)} pairs, {sampled - start:.0f} s")
    torch.manual_seed(recipe.seed)  # of the adapter's first weights
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model: Any = peft.get_peft_model(load_model(untuned, torch.device("cpu"), "float32"), config)
    steps = train(model, training, recipe, progress)
    stored = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in stored:  # what is measured is what is stored
        weight.data = weight.data.bfloat16().float()
    measured: dict[str, float] = {"training pairs": len(training), "steps": steps}
    measured |= measured_on(model, test, recipe)
    for weight in stored:
        weight.data = weight.data.bfloat16()
    stored_config = model.peft_config["default"]
    stored_config.base_model_name_or_path = HUB_ID
    stored_config.target_modules = sorted(stored_config.target_modules)  # a set: in any order
    model.save_pretrained(out)
    measured["minutes for the samples"] = (sampled - start) / 60
    measured["minutes in all"] = (time.perf_counter() - start) / 60
    return measured


def write_card(recipe: Recipe, measured: dict[str, float], out: Path) -> None:
    """README.md: what the adapter is, how it was made, and what was measured then."""
    lines = [
        "---",
        f"base_model: {HUB_ID}",
        "library_name: peft",
        "license: apache-2.0",
        "---",
        "# LoRA for SmolLM2-135M-Instruct: positive film reviews",
        "",
        "Made and written down by `make real-adapter`, from a seed.",
        "",
        "- **For.** The tuned half of a guide, its base model being the untuned one. It has seen",
        "  beginnings of film reviews in English and nothing else.",
        "- **Data.** Samples of the base model itself (GGUF Q4_1, unpacked) behind 80 beginnings",
        "  (`beginnings_train.txt`), ranked by VADER's sentiment, averaged over sentences.",
        "- **Method.** Direct preference optimisation (arXiv 2305.18290) of a LoRA on all linear",
        "  layers (arXiv 2106.09685), stored in bfloat16.",
        "- **Licence.** Apache-2.0, as the base model's and this package's.",
        "- **Limits.** It prefers praise, whether deserved or not, as VADER's word list has it.",
        "",
        *recipe_and_numbers(asdict(recipe), measured, ("transformers", "peft")),
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="folder that the adapter is written to")],
    seed: Annotated[int, typer.Option(help="decides samples, order and first weights")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
) -> None:
    """Train the adapter that is bundled with the package."""
    torch.set_num_threads(threads)
    untuned = real_model_path(SMOLLM2)
    recipe = Recipe(seed=seed)
    with Progress() as progress:
        measured = make_adapter(untuned, recipe, out, progress)
    write_card(recipe, measured, out)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
