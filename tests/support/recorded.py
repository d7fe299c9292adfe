"""Engines whose models run the operators' own CPU paths, from recordings that the CPU can make."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.support.engines import make_engine, models_of
from tests.support.recorder import Recording, set_up_as_on_cuda
from w2s_fast import Engine
from w2s_fast.decoding import DecodeGraphs, PassGraphs, Recorder


class Recorded(NamedTuple):
    """An engine, and what it has recorded."""

    engine: Engine
    steps: DecodeGraphs
    passes: list[PassGraphs]

    @classmethod
    def of(
        cls, models: Any, max_rows: int = 64, recorder: Recorder = Recording, **options: Any
    ) -> Recorded:
        """``options``: of the engine."""
        with set_up_as_on_cuda(lambda _: recorder):
            engine = make_engine(*models, max_rows=max_rows, **options)
        steps = engine._search.base.decoder.graphs
        assert steps is not None
        return cls(engine, steps, [model.replays for model in models_of(engine)])


def replays(graphs: DecodeGraphs | PassGraphs) -> int:
    """How often one of them was replayed."""
    return sum(recording.replays for recording in recorded(graphs))


def recorded(graphs: DecodeGraphs | PassGraphs) -> set[Any]:
    """The recordings that were made."""
    return {graphs.recordings[bucket].replay for bucket in graphs.recordings}
