"""Where the milliseconds of a search go: torch.profiler over one run, with the parts named.

The parts are ranges put around the engine's own functions while it is traced. An operator belongs
to the innermost range it runs in; what a range spends outside of operators is Python's, the models'
own code in transformers included. Tracing costs a few microseconds an operator, all of which look
like Python's: the run is timed without it, too.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from bench.search_cases import BATCH, ENGINE, Bench, Case
from w2s_fast import Engine
from w2s_fast.attention import GatheredPlan
from w2s_fast.cache import PagePool
from w2s_fast.decoding import Decoding, SamplingBatch
from w2s_fast.models import PagedModel

MARK = "part: "
OPERATORS_SHOWN = 12  # of each part
SMALL = 0.03  # parts below this share of the whole are shown without their operators

REST = "rest of the search"


@dataclass
class Part:
    """Microseconds. ``python``: outside of operators."""

    ranges: int = 0
    python: float = 0.0
    operators: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def total(self) -> float:
        return self.python + sum(sum(times) for times in self.operators.values())


def profile(case: Case, console: Console) -> None:
    """Trace the engine's run of a case; print its parts, and the operators of the large ones."""
    bench = Bench(case)
    variant = BATCH if BATCH in case.variants else ENGINE
    bench.run(variant)
    begin = time.perf_counter()
    bench.run(variant)
    untraced = time.perf_counter() - begin
    with _named_parts(bench.engine), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as p:
        begin = time.perf_counter()
        bench.run(variant)
        traced = time.perf_counter() - begin
    parts = _parts(p.events())
    new_tokens = case.params.max_new_tokens
    rounds = -(-new_tokens // case.params.tokens_per_round)
    console.print(
        f"\n[bold]{case.name}[/bold]: {case.shape}\n{untraced:.2f} s, traced {traced:.2f} s; "
        f"{rounds} rounds, {new_tokens} tokens a row"
    )
    _show_parts(parts, rounds, new_tokens, console)
    whole = sum(part.total for part in parts.values())
    for name, part in sorted(parts.items(), key=lambda item: -item[1].total):
        if part.total >= SMALL * whole:
            _show_operators(name, part, console)


@contextmanager
def _named_parts(engine: Engine) -> Iterator[None]:
    """While this is open, the engine's functions are ranges that the profiler records."""

    def of_model(base: str, guide: str) -> Callable[..., str]:
        return lambda model, *_: base if model is engine.base else guide

    def of_pool(pool: PagePool, *_: Any) -> str:
        return "pages, base" if pool is engine.base.pool else "pages, guides"

    def named(name: str) -> Callable[..., str]:
        return lambda *_: name

    functions: list[tuple[Any, str, Callable[..., str]]] = [
        (Engine, "generate", named(REST)),
        (PagedModel, "forward", of_model("base, first token or prompt", "guides, body")),
        (PagedModel, "logits", named("base, LM head")),
        (PagedModel, "token_partials", named("guides, LM head and log-probs")),
        (Decoding, "step", named("base, decode step")),
        (GatheredPlan, "attend", named("attention")),
        (GatheredPlan, "advance", named("attention plan")),
        (GatheredPlan, "make", named("attention plan")),
        (SamplingBatch, "draw", named("sampling")),
        (_module_of(engine._search.guides), "score_select", named("selection")),
        (_module_of(engine._search.base.expansion), "fork_beams", named("pages, base")),
        (_module_of(engine._search.guides), "fork_in_guides", named("pages, guides")),
        (_module_of(engine._search), "end_rounds", named("pages that losers held")),
        *((PagePool, name, of_pool) for name in ("reserve", "extend", "copy_pages")),
    ]
    with ExitStack() as stack:
        for owner, name, part in functions:
            stack.enter_context(mock.patch.object(owner, name, _ranged(getattr(owner, name), part)))
        yield


def _module_of(thing: object) -> Any:
    return inspect.getmodule(type(thing))


def _ranged(function: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(MARK + part(*args)):
            return function(*args, **kwargs)

    return run


def _parts(events: list[FunctionEvent]) -> dict[str, Part]:
    """Every microsecond of the traced thread, by part."""
    parts: dict[str, Part] = defaultdict(Part)
    for event in events:
        name = _part_of(event)
        if name is None:
            continue
        if event.name.startswith(MARK):
            parts[name].ranges += 1
            parts[name].python += event.self_cpu_time_total
        else:
            parts[name].operators[event.name].append(event.self_cpu_time_total)
    return parts


def _part_of(event: FunctionEvent | None) -> str | None:
    """The innermost range an event lies in; attention is told apart by the pass it belongs to."""
    names = []
    while event is not None:
        if event.name.startswith(MARK):
            names.append(event.name.removeprefix(MARK))
        event = event.cpu_parent
    if not names:
        return None
    outer = names[1] if len(names) > 1 else REST
    return f"{outer}: {names[0]}" if names[0].startswith("attention") else names[0]


def _show_parts(parts: dict[str, Part], rounds: int, steps: int, console: Console) -> None:
    whole = sum(part.total for part in parts.values())
    table = Table("part", box=box.ROUNDED, title="a token step: one token for every row")
    for heading in ("calls a round", "ms a round", "ms a token step", "share", "of it Python"):
        table.add_column(heading, justify="right")
    rows = sorted(parts.items(), key=lambda row: -row[1].total)
    for name, part in [*rows, ("all", _sum(parts))]:
        table.add_row(
            name,
            f"{part.ranges / rounds:.1f}",
            f"{part.total / rounds / 1e3:.2f}",
            f"{part.total / steps / 1e3:.2f}",
            f"{100 * part.total / whole:.1f} %",
            f"{100 * part.python / part.total:.0f} %" if part.total else "",
        )
    console.print(table)


def _sum(parts: dict[str, Part]) -> Part:
    every = Part()
    for part in parts.values():
        every.ranges += part.ranges
        every.python += part.python
        for name, times in part.operators.items():
            every.operators[name] += times
    return every


def _show_operators(name: str, part: Part, console: Console) -> None:
    """The part's operators by their own time, a call of the part."""
    table = Table("operator", box=box.SIMPLE, title=f"{name}: a call", title_justify="left")
    for heading in ("count", "ms", "share", "us each"):
        table.add_column(heading, justify="right")
    rows = sorted(part.operators.items(), key=lambda item: -sum(item[1]))[:OPERATORS_SHOWN]
    for operator, times in [("(Python)", [part.python]), *rows]:
        spent = sum(times)
        table.add_row(
            operator,
            f"{len(times) / part.ranges:.1f}" if operator != "(Python)" else "",
            f"{spent / part.ranges / 1e3:.3f}",
            f"{100 * spent / part.total:.0f} %",
            f"{spent / len(times):.1f}" if operator != "(Python)" else "",
        )
    console.print(table)
