"""Weak-to-strong search at decoding speed: a large frozen model writes, two small ones steer.

``Engine`` runs the search, ``Guide`` names a pair of small models, ``SearchParams`` holds every
knob; see ``w2s_fast.errors`` for what can be raised.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "kernels").is_dir():
    # In a checkout, installed in place or not, w2s_fast.kernels is the folder kernels/ beside this
    # one. It is no package by itself (see setup.py), and setuptools' editable finder only serves
    # folders without __init__.py at the top level.
    _kernels = ModuleType("w2s_fast.kernels")
    _kernels.__path__ = [str(Path(__file__).parent.parent / "kernels")]
    sys.modules[_kernels.__name__] = _kernels
    globals()["kernels"] = _kernels

from w2s_fast import errors
from w2s_fast.params import SearchParams
from w2s_fast.remote import RemoteBase
from w2s_fast.result import Hypothesis, RemoteUsage, SearchResult, Trace, Usage
from w2s_fast.scorer import ScoredCandidate, Scorer

if TYPE_CHECKING:
    from w2s_fast.engine import AsyncEngine, Engine, StreamPiece
    from w2s_fast.search import Guide
    from w2s_fast.text import Chat

try:
    __version__ = version("w2s-fast")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AsyncEngine",
    "Chat",
    "Engine",
    "Guide",
    "Hypothesis",
    "RemoteBase",
    "RemoteUsage",
    "ScoredCandidate",
    "Scorer",
    "SearchParams",
    "SearchResult",
    "StreamPiece",
    "Trace",
    "Usage",
    "errors",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch and transformers only when it is asked for."""
    if name == "Engine":
        from w2s_fast.engine import Engine

        return Engine
    if name == "Guide":
        from w2s_fast.search import Guide

        return Guide
    if name == "AsyncEngine":
        from w2s_fast.engine import AsyncEngine

        return AsyncEngine
    if name == "StreamPiece":
        from w2s_fast.engine import StreamPiece

        return StreamPiece
    if name == "Chat":
        from w2s_fast.text import Chat

        return Chat
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
