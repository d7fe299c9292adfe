"""Engines on a cluster of Ray, in the place of one here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import typer

from w2s_fast.cli.console import note, note_console
from w2s_fast.cli.jsonl import MadeBy
from w2s_fast.cli.models import Models, made_by, read_tokenizer
from w2s_fast.params import SearchParams

if TYPE_CHECKING:
    from w2s_fast import Engine
    from w2s_fast.ray import Engines


@dataclass(frozen=True)
class Spread:
    """What answers a file.

    Attributes:
        load: begins it. made_by: as of :func:`w2s_fast.cli.models.made_by`, where engines run.
    """

    load: Callable[[], Engines]
    made_by: MadeBy


@contextmanager
def spread(
    models: Models,
    load: Callable[..., Engine],
    params: SearchParams,
    device: str,
    dtype: str,
    actors: int,
    max_rows: int | None,
    tensor_parallel: int = 1,
) -> Iterator[Spread]:
    """While connected to the cluster, or to one that is started for that.

    Args:
        load: an engine, by ``device`` and ``quiet``; it is called in actors.
        params: of lines that set none.

    Raises:
        typer.Exit: Ray is not installed; that has been said.
    """
    try:
        from w2s_fast.ray import Engines, Pool, connected, gpus_of, run_there
    except ModuleNotFoundError as error:
        note(f"error: {error.name} is missing; pip install w2s-fast[ray]", style="red")
        raise typer.Exit(2) from None
    with connected(lambda: note_console().status("connecting to Ray")):
        gpus = gpus_of(device)
        if gpus:  # what "auto" means is for a machine that has one to say
            makers = run_there(partial(made_by, models, device, dtype), gpus)
        else:
            device = "cpu" if device == "auto" else device
            makers = made_by(models, device, dtype)
        if models.bundled:
            note(
                "no model named: using the bundled demo models (film, book and restaurant reviews)"
            )
        pool = Pool(actors, num_gpus=gpus, max_rows=max_rows, tensor_parallel=tensor_parallel)
        make = partial(load, device=device, quiet=True)
        yield Spread(lambda: Engines(make, pool, params, read_tokenizer(models)), makers)
