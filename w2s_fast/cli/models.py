"""Which models a command runs on: those named, or the bundled ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from w2s_fast import __version__
from w2s_fast.cli.console import loading, note, note_console, quiet_transformers
from w2s_fast.cli.identity import model_identity
from w2s_fast.cli.jsonl import MadeBy
from w2s_fast.cli.threads import chosen_count, take_usable_cores

if TYPE_CHECKING:
    from w2s_fast import Engine


NO_MODEL = "none"  # in the place of an untuned model's name
Decode = Callable[[list[int]], str]


class GuideNames(NamedTuple):
    """Paths or hub ids of a guide's models."""

    tuned: str
    untuned: str | None
    weight: float


@dataclass(frozen=True)
class Models:
    """Paths or hub ids of a base and its guides; `bundled` if the user named none."""

    base: str
    guides: tuple[GuideNames, ...]
    bundled: bool = False

    def named(self) -> dict[str, str]:
        """Path or hub id by what errors call the model."""
        named = {"base": self.base}
        for g, guide in enumerate(self.guides):
            number = f" {g}" if len(self.guides) > 1 else ""
            named[f"tuned{number}"] = guide.tuned
            if guide.untuned is not None:
                named[f"untuned{number}"] = guide.untuned
        return named


def made_by(models: Models, device: str, dtype: str) -> MadeBy:
    """What decides all answers, part by part, so that a later run can say what differs.

    It is the models' contents, the guides' weights, the dtype, and the versions that compute. The
    device, its attention and its memory are not in it: they are worth the last bits of a sum.

    Raises:
        InvalidRequest: the device or the dtype cannot be used.
        OSError: names a file of a model that cannot be read.
    """
    quiet_transformers(_bars(models))
    with note_console().status("looking at the models"):
        import torch

        from w2s_fast.models import pick_device, pick_dtype, read_as

        found = {}
        for role, source in models.named().items():
            for part, value in model_identity(source).items():
                found[f"{role} {part}"] = value
        for g, guide in enumerate(models.guides):
            found["guide weight" if len(models.guides) == 1 else f"guide {g} weight"] = str(
                float(guide.weight)
            )
        where = pick_device(device)
        picked = pick_dtype(dtype, where)
        found["dtype"] = str(picked).removeprefix("torch.")
        if picked is None:
            half = read_as(torch.float32, where) is not torch.float32
            found["dtype"] = "checkpoint's, float32 as bfloat16" if half else "checkpoint's"
        found["w2s-fast"] = __version__
        for package in ("torch", "transformers"):
            found[package] = version(package).split("+")[0]  # behind it: for which device
    return found


def name_models(
    base: str | None, tuned: list[str], untuned: list[str], weights: list[float]
) -> Models:
    """Checks what the user named against itself; the bundled models if that is nothing.

    Raises:
        typer.BadParameter: a base without its guides' partners, or the other way round.
    """
    if base is None and not tuned and not untuned:
        return _bundled(weights)
    if base is None:
        raise typer.BadParameter("--tuned and --untuned steer a base: name it with --base")
    if len(tuned) != len(untuned):
        raise typer.BadParameter(
            f"each --tuned needs its --untuned ({NO_MODEL}: it has none), and the other way round"
        )
    if weights and len(weights) != len(tuned):
        raise typer.BadParameter(f"{len(weights)} --weight for {len(tuned)} guides")
    factors = weights or [1.0] * len(tuned)
    partners = [None if name == NO_MODEL else name for name in untuned]
    return Models(base, tuple(map(GuideNames, tuned, partners, factors)))


def _bundled(weights: list[float]) -> Models:
    from w2s_fast.demo import demo_model_paths

    if len(weights) > 1:
        raise typer.BadParameter("the bundled models are one guide: give --weight once")
    paths = demo_model_paths()
    guide = GuideNames(str(paths.tuned), str(paths.untuned), weights[0] if weights else 1.0)
    return Models(str(paths.base), (guide,), bundled=True)


def load_engine(
    models: Models,
    device: str = "auto",
    dtype: str = "auto",
    kv_cache_tokens: int | None = None,
    quiet: bool = False,
    **options: Any,
) -> Engine:
    """Loads the models, saying on standard error when they are the bundled ones, and in a terminal
    what each of others is.

    ``options``: more of the engine's.
    """
    if models.bundled and not quiet:
        note("no model named: using the bundled demo models (film, book and restaurant reviews)")
    quiet_transformers(_bars(models))
    with loading(_bars(models)):
        import torch

        from w2s_fast import Engine, Guide

        take_usable_cores()
        if models.bundled and chosen_count() is None:
            # Their operations are too small to share. On two busy cores, where threads wait for
            # one another, two of them took 8 to 14 times as long as one.
            torch.set_num_threads(1)
        return Engine(
            base=models.base,
            guides=[Guide(**names._asdict()) for names in models.guides] or None,
            device=device,
            dtype=dtype,
            kv_cache_tokens=kv_cache_tokens,
            **options,
        )


def _bars(models: Models) -> bool:
    """Whether somebody sees the loading, and it may take a while."""
    return not models.bundled and note_console().is_terminal


def decoder(engine: Engine) -> Decode:
    """Token ids to text, without special tokens; to a list of numbers if there is no tokenizer."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        return str
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
