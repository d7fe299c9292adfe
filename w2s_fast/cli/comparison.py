"""A comparison of methods on one base or several: run, measured, shown and written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from w2s_fast.cli.console import note, out_console
from w2s_fast.cli.eval_run import answer_all, requests_of, traced_result
from w2s_fast.cli.jsonl import MadeBy, Record
from w2s_fast.cli.models import GuideNames, Models, decoder, load_engine, made_by, name_models
from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams

if TYPE_CHECKING:
    from w2s_fast import Engine
    from w2s_fast.demo import Method
    from w2s_fast.evaluate import Answer, Reward, Row


@dataclass(frozen=True)
class Subject:
    """A base with its guides, and what its table calls it."""

    name: str
    models: Models


@dataclass(frozen=True)
class Plan:
    """What an evaluation runs, but for the prompts."""

    task: str
    subjects: list[Subject]
    common: SearchParams
    betas: list[float]
    ablation: bool
    short: bool
    seeds: int
    gold_model: str | None
    gold_label: str | None
    out: Path
    resume: bool
    device: str
    dtype: str
    plain: bool
    tree: bool = False

    @property
    def reward_name(self) -> str:
        return self.gold_model or "VADER"


def subjects_named(
    base: list[str] | None,
    tuned: list[str] | None,
    untuned: list[str] | None,
    weight: list[float] | None,
    real: bool,
) -> list[Subject]:
    """Who is evaluated: those named, the fetched ones, or the bundled one."""
    if real:
        if base or tuned or untuned:
            raise typer.BadParameter("--real names all models: leave --base and the guides out")
        if weight and len(weight) > 1:
            raise typer.BadParameter("--real has one guide: give --weight once")
        return _real_subjects((weight or [1.0])[0])
    if not base:
        return [Subject("bundled", name_models(None, tuned or [], untuned or [], weight or []))]
    if not tuned:
        raise typer.BadParameter("steering needs --tuned and --untuned")
    names = [Path(each).name or each for each in base]
    if len(set(names)) < len(names):
        names = base
    return [
        Subject(name, name_models(each, tuned, untuned or [], weight or []))
        for name, each in zip(names, base)
    ]


def _real_subjects(weight: float) -> list[Subject]:
    from w2s_fast.demo import adapter_path
    from w2s_fast.real import REAL_MODELS, SMOLLM2, is_fetched, real_model_path

    guide = GuideNames(str(adapter_path()), str(real_model_path(SMOLLM2)), weight)
    return [
        Subject(name, Models(str(real_model_path(name)), (guide,)))
        for name, model in REAL_MODELS.items()
        if is_fetched(model)
    ]


def make_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InvalidRequest(f"--out {out} is a file; allowed: a folder, or a new name")
    if out.is_dir() and any(out.glob("*answers.jsonl")) and not resume:
        raise InvalidRequest(
            f"{out} holds answers: --resume goes on with them, another --out spares them"
        )
    out.mkdir(parents=True, exist_ok=True)


def evaluate(plan: Plan, prompts_for: Callable[[Models], list[str]]) -> None:
    from w2s_fast.evaluate import evaluation_table, table_lines

    # Whatever can be refused is refused before models are loaded.
    prompts = [prompts_for(subject.models) for subject in plan.subjects]
    make_folder(plan.out, plan.resume)
    reward = _reward(plan)
    console = out_console(plan.plain)
    ascii_only = plan.plain or console.options.ascii_only
    rows: list[Row] = []
    makers: dict[str, MadeBy] = {}
    failed = 0
    for subject, texts in zip(plan.subjects, prompts):
        makers[subject.name] = made_by(subject.models, plan.device, plan.dtype)
        engine = load_engine(subject.models, plan.device, plan.dtype, quiet=True)
        found, tree, lost = _run(plan, subject, engine, texts, makers[subject.name], reward)
        rows += found
        failed += lost
        if tree is not None and plan.tree:
            _show_tree(engine, texts[0], tree, console, ascii_only)
        del engine  # its pages, before the next one asks for some
    console.print(evaluation_table(rows, plan.reward_name, ascii_only))
    console.print(table_lines(), style="dim", markup=False)
    _write_files(plan, rows, makers)
    console.print(f"Reproduce: {_command()}", style="dim", markup=False, soft_wrap=True)
    exit_by(failed)


def _reward(plan: Plan) -> Reward:
    from w2s_fast.evaluate import ClassifierReward, vader_reward

    if plan.gold_model is None:
        return vader_reward
    return ClassifierReward(plan.gold_model, plan.gold_label)


def _run(
    plan: Plan,
    subject: Subject,
    engine: Engine,
    prompts: Sequence[str],
    makers: MadeBy,
    reward: Reward,
) -> tuple[list[Row], Record | None, int]:
    """The rows of one base, the record that has a trace, and how many requests failed."""
    from w2s_fast.evaluate import BASE, BEST_OF, comparison_methods, measured

    methods = comparison_methods(plan.common, plan.betas, plan.ablation, plan.short)
    methods = _possible(engine, methods, prompts[0], subject.name)
    search = next(method.name for method in methods if method.params.method == "cbs")
    requests = requests_of(methods, prompts, plan.seeds, plan.common.seed, makers, traced=search)
    path = plan.out / f"{_file_name(subject.name)}-answers.jsonl"
    records = answer_all(engine, requests, makers, path, plan.resume)
    answers: dict[str, list[Answer]] = {}
    failed = 0
    for name, own in requests.items():
        kept = [r for r in own if "error" not in records[r.index]]
        failed += len(own) - len(kept)
        if not kept:
            raise InvalidRequest(f"{name} failed on every prompt: {records[own[0].index]['error']}")
        places = [request.index // len(methods) // plan.seeds for request in kept]
        answers[name] = _answers(places, prompts, [records[r.index] for r in kept], reward)
    tree = next((record for record in records.values() if record.get("trace")), None)
    return measured(subject.name, answers, BASE, BEST_OF), tree, failed


def _possible(engine: Engine, methods: list[Method], prompt: str, base: str) -> list[Method]:
    """Without those that fuse logits where these models have none to fuse."""
    kept: list[Method] = []
    reasons: dict[str, list[str]] = {}
    for method in methods:
        try:
            if method.params.fuses:
                engine.make_request(prompt, method.params)
            kept.append(method)
        except InvalidRequest as error:
            reasons.setdefault(str(error), []).append(method.name)
    for reason, names in reasons.items():
        note(f"{base}: left out {', '.join(names)}: {reason}")
    return kept


def _answers(
    places: Sequence[int], prompts: Sequence[str], records: Sequence[Record], reward: Reward
) -> list[Answer]:
    from w2s_fast.evaluate import Answer

    texts = [record["text"] or "" for record in records]
    rewards = reward([prompts[place] + text for place, text in zip(places, texts)])
    return [
        Answer(
            prompt=place,
            text=text,
            reward=value,
            fluency=record["fluency"],
            tokens=record["usage"]["completion_tokens"],
            sampled=record["usage"]["sampled_tokens"],
            seconds=record["seconds"],
        )
        for place, text, value, record in zip(places, texts, rewards, records)
    ]


def _show_tree(engine: Engine, prompt: str, record: Record, console: Any, ascii_only: bool) -> None:
    from w2s_fast.demo import search_tree

    console.print(search_tree(prompt, traced_result(record), decoder(engine), ascii_only))
    console.print()


def _write_files(plan: Plan, rows: Sequence[Row], makers: dict[str, MadeBy]) -> None:
    from w2s_fast.evaluate import can_plot, write_csv, write_json, write_plots

    write_csv(rows, plan.out / "table.csv")
    settings = {
        "task": plan.task,
        "reward": plan.reward_name,
        "sampling": asdict(plan.common),
        "made_by": makers,
        "command": _command(),
    }
    write_json(rows, settings, plan.out / "table.json")
    if can_plot():
        write_plots(rows, plan.reward_name, plan.out / "plot")
    else:
        note("no plot: pip install matplotlib")
    note(f"answers, tables and what is drawn of them are in {plan.out}")


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _command() -> str:
    import shlex

    words = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join(["w2s-fast", *words])


def exit_by(failed: int) -> None:
    if failed:
        note(f"{failed} requests failed; --resume tries them again", style="yellow")
        raise typer.Exit(1)
