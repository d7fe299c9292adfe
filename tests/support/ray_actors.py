"""Engines as actors of Ray make them, and what can happen to them; actors import it by its name."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.demo import demo_model_paths
from w2s_fast.result import SearchResult

PARAMS = SearchParams(beam_width=2, successors=2, max_new_tokens=12)
DEADLY = "this kills"


def make() -> Engine:
    """The bundled models, on a CPU; results are the same to the last digit."""
    paths = demo_model_paths()
    guide = Guide(str(paths.tuned), str(paths.untuned))
    return Engine(
        str(paths.base), guide, device="cpu", dtype="float64", kv_cache_tokens=8192, max_rows=32
    )


def make_noted(folder: Path) -> Engine:
    """The same; each process leaves its number in the folder."""
    (folder / str(os.getpid())).touch()
    return make()


class Mortal:
    """An engine whose process dies of one prompt, in the midst of others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engine = make_noted(folder)

    def generate(
        self, prompts: Sequence[Any], params: Sequence[SearchParams], **options: Any
    ) -> list[SearchResult]:
        if DEADLY in prompts:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return self._engine.generate(prompts, params, **options)
