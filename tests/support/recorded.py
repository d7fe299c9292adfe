"""Engines whose models run the operators' own CPU paths, from recordings that the CPU can make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from tests.support.engines import make_engine, models_of
from tests.support.recorder import Recording, set_up_as_on_cuda
from w2s_fast import Engine
from w2s_fast.attention.staging import _NUMPY
from w2s_fast.decoding import DecodeGraphs, PassGraphs, Recorder
from w2s_fast.decoding.first_step import FirstStep
from w2s_fast.decoding.graphs import Recordings
from w2s_fast.decoding.sampling import SamplingColumns, sampling_fields
from w2s_fast.decoding.step import Step
from w2s_fast.models import run_body


class Recorded(NamedTuple):
    """An engine, and what it has recorded."""

    engine: Engine
    steps: DecodeGraphs
    passes: list[PassGraphs]

    @property
    def rounds(self) -> list[Recordings[Any, Any]]:
        """What a round replays once."""
        scores = self.engine._search.guides._graphs
        assert scores is not None
        return [self.steps.firsts, scores.recordings]

    @classmethod
    def of(
        cls, models: Any, max_rows: int = 64, recorder: Recorder = Recording, **options: Any
    ) -> Recorded:
        """``options``: of the engine."""
        with set_up_as_on_cuda(lambda _: recorder):
            engine = make_engine(*models, max_rows=max_rows, **options)
        steps = engine._search.base.expansion.decoder.graphs
        assert steps is not None
        return cls(engine, steps, [model.replays for model in models_of(engine)])


def replays(graphs: DecodeGraphs | PassGraphs | Recordings[Any, Any]) -> int:
    """How often one of them was replayed."""
    return sum(recording.replays for recording in recorded(graphs))


def recorded(graphs: DecodeGraphs | PassGraphs | Recordings[Any, Any]) -> set[Any]:
    """The recordings that were made."""
    made = graphs if isinstance(graphs, Recordings) else graphs.recordings
    return {made[bucket].replay for bucket in made}


def record_missed(engine: Engine) -> None:
    """What is done between two steps when nobody waits."""
    with engine.runner.turn():
        engine.runner.record_missed()


_PASSES = ("models.model", "decoding.pass_graphs", "search.score_graphs")
_STEPS = ("decoding.decoding",)


def unrecorded_passes() -> AbstractContextManager[list[list[int]]]:
    """Of all passes that are run without a recording the numbers of new tokens of their rows.

    Rows that a bucket has too many are not among them, nor passes that are just being recorded.
    """
    return _run_in((*_PASSES, *_STEPS), (FirstStep, Step))


def unrecorded_steps() -> AbstractContextManager[list[list[int]]]:
    """The same of decoding steps."""
    return _run_in(_STEPS, (Step,))


@contextmanager
def _run_in(
    places: Sequence[str], statics: Sequence[type[FirstStep | Step]]
) -> Iterator[list[list[int]]]:
    seen: list[list[int]] = []
    make, being_recorded = Recordings.make, False

    def see(plan: Any) -> None:
        if not being_recorded:
            seen.append([new for new in plan.cu_seqlens_q.diff().tolist() if new])

    def run(view: Any, tokens: Any, positions: Any, plan: Any, *body: Any) -> Any:
        see(plan)
        return run_body(view, tokens, positions, plan, *body)

    def seen_run(run_static: Callable[[Any], None]) -> Callable[[Any], None]:
        def run(static: Any) -> None:
            see(static.passes.plans[0].plan)
            run_static(static)

        return run

    def recorded(self: Recordings[Any], bucket: Any) -> None:
        nonlocal being_recorded
        being_recorded = True
        make(self, bucket)
        being_recorded = False

    with ExitStack() as stack, mock.patch.object(Recordings, "make", recorded):
        for place in places:
            stack.enter_context(mock.patch(f"w2s_fast.{place}.run_body", run))
        for static in statics:
            stack.enter_context(mock.patch.object(static, "run", seen_run(static.run)))
        yield seen


def settings(rows: int) -> SamplingColumns:
    """Of rows that are sampled, each with noise of its own."""
    return columns(
        temperature=[0.8] * rows,
        top_k=[50] * rows,
        top_p=[0.9] * rows,
        min_p=[0.0] * rows,
        seed=[0] * rows,
        candidate=list(range(rows)),
        position=[0] * rows,
    )


def columns(**values: list[Any]) -> SamplingColumns:
    """Sampling columns of these values, in their dtypes."""
    fields = sampling_fields(1)
    arrays = {name: np.array(v, _NUMPY[fields[name].dtype]) for name, v in values.items()}
    return SamplingColumns(**arrays)
