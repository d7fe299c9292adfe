"""Makes the bundled adapter: `python -m w2s_fast.demo.tune --out DIR`.

LoRA on SmolLM2-135M-Instruct, preferring positive film reviews: direct preference optimisation on
the model's own samples, ranked by the demo's gold reward. It needs that model (`w2s-fast
fetch-models`) and peft.
"""

from __future__ import annotations

import random
import statistics
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
from w2s_fast.demo.gold import gold_reward
from w2s_fast.models import load_model
from w2s_fast.real import SMOLLM2, real_model_path

# What is measured: pairs whose gold rewards differ by more, and the choice among so many samples.
_MEASURED_MARGIN, _PICKED_FROM = 0.2, 8
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the adapter's config says it goes with


@dataclass(frozen=True)
class Recipe:
    """All that decides what the adapter becomes."""

    seed: int = 0
    held_out_prompts: int = 8  # of the training prompts: their samples measure, and train nothing
    samples: int = 24  # a prompt, drawn as the search draws them
    temperature: float = 0.7
    top_k: int = 50
    max_new_tokens: int = 50
    extremes: int = 4  # of a prompt each of its best so many makes a pair with each of its worst
    margin: float = 0.1  # pairs whose gold rewards lie closer are dropped
    rank: int = 4
    alpha: int = 8
    beta: float = 0.1
    lr: float = 5e-4  # its peak
    warmup: int = 5  # steps; a step is a prompt
    epochs: int = 3


@dataclass(frozen=True)
class Group:
    """A prompt's samples as token ids, and the gold reward of each, best first."""

    prompt: list[int]
    responses: list[list[int]]
    rewards: list[float]

    def extremes(self, count: int) -> Group:
        """So many of the best, and behind them as many of the worst."""
        count = min(count, len(self.rewards) // 2)
        ends = slice(0, count), slice(len(self.rewards) - count, None)
        return Group(
            self.prompt,
            [response for end in ends for response in self.responses[end]],
            [reward for end in ends for reward in self.rewards[end]],
        )

    def better(self, margin: float) -> torch.Tensor:
        """Which response is better than which by more than this, bool [responses, responses]."""
        rewards = torch.tensor(self.rewards)
        return rewards[:, None] - rewards[None, :] > margin


def ranked_samples(engine: Engine, prompts: list[str], recipe: Recipe) -> list[Group]:
    """Each prompt's own samples, ranked."""
    params = SearchParams(
        method="sample",
        n=recipe.samples,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
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
        rewards, responses = [own for own, _ in ranked], [own for _, own in ranked]
        found.append(Group(tokenizer(prompt)["input_ids"], responses, rewards))
    return found


def response_log_probs(model: Any, group: Group) -> torch.Tensor:
    """Summed log-probs of the responses behind the prompt, in nats, [responses]."""
    begin, count = len(group.prompt), len(group.responses)
    width = begin + max(map(len, group.responses))
    width = -(-width // 16) * 16 + 1  # few different widths, so that memory is found again
    ids = torch.zeros(count, width, dtype=torch.long)
    counted = torch.zeros(count, width, dtype=torch.bool)
    for row, response in enumerate(group.responses):
        end = begin + len(response)
        ids[row, :end] = torch.tensor(group.prompt + response)
        counted[row, begin:end] = True
    counted = counted[:, 1:]
    whole = model.get_base_model()
    # Padding stands on the right, where no counted token can see it: no mask is needed. Logits are
    # computed where they count.
    hidden = whole.model(input_ids=ids[:, :-1]).last_hidden_state
    log_probs = -F.cross_entropy(
        whole.lm_head(hidden[counted]), ids[:, 1:][counted], reduction="none"
    )
    return torch.zeros(count).index_add(0, counted.nonzero()[:, 0], log_probs)


@torch.no_grad()
def without_adapter(model: Any, group: Group) -> torch.Tensor:
    with model.disable_adapter():
        return response_log_probs(model, group)


def dpo_loss(ratios: torch.Tensor, group: Group, recipe: Recipe) -> torch.Tensor:
    """-log sigmoid(beta * margin), the mean over all pairs of one of the first half, and one of
    the second. A response runs once, however many pairs it belongs to.

    ``ratios``: log p with the adapter less log p without it, [responses].
    """
    half = len(group.rewards) // 2
    margins = (ratios[:half, None] - ratios[None, half:])[group.better(recipe.margin)[:half, half:]]
    return -F.logsigmoid(recipe.beta * margins).mean()


def train(model: Any, groups: list[Group], recipe: Recipe, progress: Progress) -> int:
    """Trains the adapter in place; how many steps it took."""
    rng = random.Random(recipe.seed)
    groups = [group.extremes(recipe.extremes) for group in groups]
    groups = [group for group in groups if group.better(recipe.margin).any()]
    references = [without_adapter(model, group) for group in groups]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    steps, step = recipe.epochs * len(groups), 0
    bar = progress.add_task("training", total=steps)
    for _ in range(recipe.epochs):
        for i in rng.sample(range(len(groups)), len(groups)):
            rate = min(1.0, (step + 1) / recipe.warmup) * (1 - step / steps)
            optimizer.param_groups[0]["lr"] = recipe.lr * rate
            ratios = response_log_probs(model, groups[i]) - references[i]
            loss = dpo_loss(ratios, groups[i], recipe)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            progress.update(bar, advance=1, description=f"training, loss {loss.item():.3f}")
            if step % 20 == 0 and not progress.console.is_terminal:
                progress.console.print(f"step {step} of {steps}, loss {loss.item():.3f}")
    return steps


@torch.no_grad()
def measured_on(model: Any, groups: list[Group], recipe: Recipe) -> dict[str, float]:
    """Of all pairs of these samples, and of the guide's choice among 8 of them at a time."""
    right, margins, mean, picked, best = [], [], [], [], []
    for group in groups:
        ratios = response_log_probs(model, group) - without_adapter(model, group)
        between = (ratios[:, None] - ratios[None, :])[group.better(_MEASURED_MARGIN)]
        right.append((between > 0).float().mean().item())
        margins.append(between.mean().item())
        mean.append(statistics.mean(group.rewards))
        # By turns, so that each part has good and bad ones.
        for first in range(parts := max(1, len(group.rewards) // _PICKED_FROM)):
            own = range(first, len(group.rewards), parts)
            picked.append(group.rewards[own[int(ratios[list(own)].argmax())]])
            best.append(group.rewards[first])
    return {
        "held-out prompts": len(groups),
        "accuracy on pairs of their samples": statistics.mean(right),
        "mean log-ratio margin of these pairs (nats)": statistics.mean(margins),
        "mean gold reward of these samples": statistics.mean(mean),
        f"that of the guide's choice among {_PICKED_FROM}": statistics.mean(picked),
        f"that of the best among {_PICKED_FROM}": statistics.mean(best),
    }


def make_adapter(untuned: Path, recipe: Recipe, out: Path, progress: Progress) -> dict[str, float]:
    """Writes the adapter as PEFT does, in bfloat16, and returns what was measured."""
    start = time.perf_counter()
    prompts = training_beginnings()
    groups = ranked_samples(Engine(base=untuned, device="cpu"), prompts, recipe)
    split = len(groups) - recipe.held_out_prompts
    training, test = groups[:split], groups[split:]
    sampled = time.perf_counter()
    progress.console.print(f"sampled, {sampled - start:.0f} s")
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
    measured: dict[str, float] = {"training prompts": len(training), "steps": steps}
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
        "  layers (arXiv 2106.09685), stored in bfloat16. Every good sample of a prompt makes a",
        "  pair with every bad one, and runs once for all of its pairs.",
        "- **Licence.** Apache-2.0, as the base model's and this package's.",
        "- **Limits.** It prefers praise, whether deserved or not, as VADER's word list has it.",
        "",
        *recipe_and_numbers(asdict(recipe), measured, ("transformers", "peft")),
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="folder that the adapter is written to")],
    seed: Annotated[int, typer.Option(help="decides samples, order and first weights")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; the last bits depend on it")] = 2,
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
