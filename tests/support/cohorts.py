"""Engines whose requests run in two cohorts, however few rows they have."""

from __future__ import annotations

from w2s_fast import Engine
from w2s_fast.scheduling import Runner


def in_cohorts(e: Engine, cohorts: int | None = 2, ahead: bool = True) -> Engine:
    """The same engine, which nobody uses yet, with another runner; see :class:`Runner`.

    Its steps are launched ahead, as on CUDA, if that is asked for.
    """
    e._search._ahead = ahead
    e.runner = Runner(e._search, e._scheduler, cohorts=cohorts)
    return e
