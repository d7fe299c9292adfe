"""`w2s-fast eval`: the paper's comparisons on named, real or bundled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from w2s_fast.cli.comparison import Plan, evaluate, exit_by, make_folder, subjects_named
from w2s_fast.cli.console import note
from w2s_fast.cli.eval_run import answer_all, requests_of
from w2s_fast.cli.model_options import Device, Dtype, Tuned, Untuned, Weight
from w2s_fast.cli.models import Models, load_engine, made_by
from w2s_fast.cli.options import MACHINE, MODELS, SAMPLING, option
from w2s_fast.params import SearchParams

evaluation = typer.Typer(
    no_args_is_help=True,
    help="Compare the base alone, best-of-N, fused logits and the search.",
)

TASK = "Task"

Base = Annotated[
    list[str] | None,
    option("--base", help="Large model; repeat: several in one table", panel=MODELS),
]
Real = Annotated[
    bool,
    option("--real", help="The fetched models, under the bundled adapter", panel=MODELS),
]
Out = Annotated[
    Path, option("--out", help="Folder for answers, tables and plots; made", panel=TASK)
]
Resume = Annotated[bool, option("--resume", help="Go on with an interrupted --out", panel=TASK)]
Count = Annotated[
    int | None, option("--count", help="Prompts; default: all, 100 bundled", panel=TASK, min=2)
]
Seeds = Annotated[int, option("--seeds", help="Answers to each prompt", panel=TASK, min=1)]
GoldModel = Annotated[
    str | None, option("--gold-model", help="Sequence classifier as reward", panel=TASK)
]
GoldLabel = Annotated[
    str | None, option("--gold-label", help="Its label; default: the last", panel=TASK)
]
Betas = Annotated[
    str, option("--betas", help="Of EFT, with commas between; none: no EFT", panel=TASK)
]
Ablation = Annotated[
    bool, option("--ablation/--no-ablation", help="W against K at W*K = 16", panel=TASK)
]
Short = Annotated[bool, option("--short", help="Only base, best-of-16, EFT, W=4 K=4", panel=TASK)]
Tokens = Annotated[int, option("--max-new-tokens", help="Of an answer at most", panel=SAMPLING)]
Temperature = Annotated[float, option("--temperature", help="0: greedy", panel=SAMPLING)]
TopK = Annotated[int, option("--top-k", help="0: off", panel=SAMPLING)]
Seed = Annotated[int, option("--seed", help="Of prompts and sampling", panel=SAMPLING, min=0)]
Plain = Annotated[bool, option("--plain", help="No colour, nothing that moves", panel=MACHINE)]

DEFAULT = SearchParams()


@evaluation.command()
def sentiment(
    out: Out,
    base: Base = None,
    tuned: Tuned = None,
    untuned: Untuned = None,
    weight: Weight = None,
    real: Real = False,
    prompts: Annotated[
        Path | None,
        option("--prompts", help="Text: one a line; .jsonl: its prompt", panel=TASK),
    ] = None,
    count: Count = None,
    seeds: Seeds = 1,
    gold_model: GoldModel = None,
    gold_label: GoldLabel = None,
    betas: Betas = "0.5,1,2",
    ablation: Ablation = True,
    short: Short = False,
    tree: Annotated[
        bool, option("--tree", help="Show a search tree for each base", panel=TASK)
    ] = False,
    resume: Resume = False,
    max_new_tokens: Tokens = 50,
    temperature: Temperature = DEFAULT.temperature,
    top_k: TopK = DEFAULT.top_k,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    plain: Plain = False,
) -> None:
    """Controlled sentiment: continue reviews, the more positive the better.

    With no model named, the bundled ones are evaluated, on held-out reviews of theirs; others on
    beginnings of film reviews that no adapter of this package has been trained on.
    """
    subjects = subjects_named(base, tuned, untuned, weight, real)
    common = SearchParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )

    def prompts_for(models: Models) -> list[str]:
        if prompts is not None:
            from w2s_fast.evaluate import read_prompts

            return read_prompts(prompts)[:count]
        from w2s_fast.demo import held_out_beginnings, held_out_prompts

        if models.bundled:
            return held_out_prompts(count or 100, seed)
        return held_out_beginnings()[:count]

    plan = Plan(
        task="sentiment", subjects=subjects, common=common, betas=_numbers(betas),
        ablation=ablation, short=short, seeds=seeds, gold_model=gold_model, gold_label=gold_label,
        out=out, resume=resume, device=device, dtype=dtype, plain=plain, tree=tree,
    )  # fmt: skip
    evaluate(plan, prompts_for)


@evaluation.command()
def summarization(
    data: Annotated[
        Path, option("--data", help="JSONL: a post, or a whole prompt, a line", panel=TASK)
    ],
    gold_model: Annotated[
        str, option("--gold-model", help="Reward model or sequence classifier", panel=TASK)
    ],
    out: Out,
    base: Base = None,
    tuned: Tuned = None,
    untuned: Untuned = None,
    weight: Weight = None,
    real: Real = False,
    template: Annotated[
        str, option("--template", help="Around a post", panel=TASK)
    ] = "POST: {post}\n\nTL;DR:",
    count: Count = None,
    seeds: Seeds = 1,
    gold_label: GoldLabel = None,
    betas: Betas = "0.5,1,2",
    ablation: Ablation = True,
    short: Short = False,
    resume: Resume = False,
    max_new_tokens: Tokens = 50,
    temperature: Temperature = DEFAULT.temperature,
    top_k: TopK = DEFAULT.top_k,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    plain: Plain = False,
) -> None:
    """Summaries of posts, by the reward model that you name."""
    from w2s_fast.evaluate import read_posts

    posts = read_posts(data, template.replace("\\n", "\n"))[:count]
    common = SearchParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    subjects = subjects_named(base, tuned, untuned, weight, real)
    plan = Plan(
        task="summarization", subjects=subjects, common=common, betas=_numbers(betas),
        ablation=ablation, short=short, seeds=seeds, gold_model=gold_model, gold_label=gold_label,
        out=out, resume=resume, device=device, dtype=dtype, plain=plain,
    )  # fmt: skip
    evaluate(plan, lambda models: posts)


@evaluation.command()
def alpaca(
    instructions: Annotated[
        Path, option("--instructions", help="alpaca_eval's set: a JSON list", panel=TASK)
    ],
    out: Out,
    base: Annotated[str | None, option("--base", help="Large model", panel=MODELS)] = None,
    tuned: Tuned = None,
    untuned: Untuned = None,
    weight: Weight = None,
    real: Real = False,
    generator: Annotated[
        str | None, option("--generator", help="Its name in the file", panel=TASK)
    ] = None,
    count: Annotated[
        int | None, option("--count", help="Instructions; default: all", panel=TASK, min=1)
    ] = None,
    resume: Resume = False,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = DEFAULT.temperature,
    top_k: TopK = DEFAULT.top_k,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answers to instructions in `outputs.json`, as the package alpaca_eval reads them.

    An instruction is a message of a user in each model's own chat template; where the base has
    none, it is the prompt as it is.
    """
    from w2s_fast.evaluate import alpaca_method, alpaca_record, read_instructions

    found = read_instructions(instructions)[:count]
    subject = subjects_named([base] if base else None, tuned, untuned, weight, real)[0]
    makers = made_by(subject.models, device, dtype)
    make_folder(out, resume)
    engine = load_engine(subject.models, device, dtype)
    method = alpaca_method(
        SearchParams(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    )
    prompts: list[Any] = [each.instruction for each in found]
    if getattr(engine.tokenizer, "chat_template", None):
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    else:
        note(f"{subject.name} has no chat template: instructions are prompts as they are")
    requests = requests_of([method], prompts, 1, seed, makers)
    records = answer_all(engine, requests, makers, out / "answers.jsonl", resume)
    name = generator or f"w2s-fast, {subject.name}"
    answered = [i for i in range(len(found)) if "error" not in records[i]]
    outputs = [alpaca_record(found[i], records[i]["text"] or "", name) for i in answered]
    path = out / "outputs.json"
    path.write_text(json.dumps(outputs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    note(f"{len(outputs)} outputs of {name} in {path}")
    exit_by(len(found) - len(answered))


def _numbers(text: str) -> list[float]:
    if text.strip().lower() == "none":
        return []
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--betas {text!r}: numbers with commas between, or none"
        ) from None
