"""How much is tried: half of it where somebody waits for the tests."""

from __future__ import annotations

import os

from hypothesis import settings

TIMES = 2 if os.environ.get("CI") or os.environ.get("W2S_FAST_THOROUGH") else 1


def drawn(examples: int) -> settings:
    """Settings of so many examples before a merge (.ci/run); elsewhere of half as many."""
    return settings(max_examples=-(-examples * TIMES // 2))
