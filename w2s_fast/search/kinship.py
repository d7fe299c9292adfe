"""What the rows of a search have in common: prompts, and what siblings inherited."""

from __future__ import annotations

from typing import TypeAlias

from w2s_fast.attention import Level, RowTree
from w2s_fast.cache import Int32Array

# Groups and ends of rows: those of a request, and within them of siblings (csrc/rounds.h).
Levels: TypeAlias = tuple[tuple[Int32Array, Int32Array], tuple[Int32Array, Int32Array]]


def family_tree(levels: Levels) -> RowTree:
    """What rows share: those of a request its prompt and more, siblings what they inherited."""
    return RowTree.of([Level(*level) for level in levels], len(levels[0][0]))
