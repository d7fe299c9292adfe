"""Bars that transformers draws while it loads: none, unless somebody listens to what is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as _logging

logging: Any = _logging  # its switch has no types
# Draws by tqdm itself, which knows no settings but those of the environment.
_GGUF = "transformers.modeling_gguf_pytorch_utils"


@contextmanager
def no_bars() -> Iterator[None]:
    """Within, transformers draws none. Those of downloads, which may take long, are left alone."""
    shown, of_downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    gguf: Any = sys.modules.get(_GGUF)
    tqdm = getattr(gguf, "tqdm", None)
    logging.disable_progress_bar()
    _set_downloads(of_downloads)
    if tqdm is not None:
        gguf.tqdm = _bare
    try:
        yield
    finally:
        if tqdm is not None:
            gguf.tqdm = tqdm
        if shown:
            logging.enable_progress_bar()
        _set_downloads(of_downloads)


def _set_downloads(shown: bool) -> None:
    """transformers' switch is theirs, too."""
    if shown != (not are_progress_bars_disabled()):
        (enable_progress_bars if shown else disable_progress_bars)()


def _bare(items: Iterable[Any], *arguments: Any, **options: Any) -> Iterable[Any]:
    return items
