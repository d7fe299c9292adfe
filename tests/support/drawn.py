"""How many examples hypothesis draws: fewer where somebody waits for them."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings


def drawn(examples: int, **more: Any) -> settings:
    """Settings of so many examples where CI is set; elsewhere of half as many."""
    return settings(max_examples=examples if os.environ.get("CI") else -(-examples // 2), **more)
