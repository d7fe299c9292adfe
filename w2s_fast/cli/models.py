"""Which models a command runs on: those named, or the bundled ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from w2s_fast import __version__
from w2s_fast.cli.console import (
    loading,
    note,
    note_console,
    quiet_transformers,
    show_warnings_as_notes,
)
from w2s_fast.cli.identity import model_identity
from w2s_fast.cli.jsonl import MadeBy
from w2s_fast.cli.threads import chosen_count, take_usable_cores
from w2s_fast.errors import UnsupportedModel, W2SFastError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from w2s_fast import Engine, RemoteBase


NO_MODEL = "none"  # in the place of an untuned model's name
Decode = Callable[[list[int]], str]


class GuideNames(NamedTuple):
    """Paths or hub ids of a guide's models, and what else a :class:`w2s_fast.Guide` has."""

    tuned: str
    untuned: str | None
    weight: float
    prompt_template: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Models:
    """Paths or hub ids of a base and its guides; `bundled` if the user named none.

    ``tokenizer``: path or hub id of the base's, where it does not lie with it. ``prompt_template``:
    of the base. ``remote``: a base that is a server's; then ``base`` names no model.
    """

    base: str
    guides: tuple[GuideNames, ...]
    bundled: bool = False
    tokenizer: str | None = None
    prompt_template: str | None = None
    remote: RemoteBase | None = None

    def named(self) -> dict[str, str]:
        """Path or hub id by what errors call the model."""
        named = {} if self.remote else {"base": self.base}
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

        from w2s_fast.models import find_adapter, pick_device, pick_dtype, read_as

        found = {}
        named = models.named()
        for role, source in models.named().items():
            adapter, beside = find_adapter(source), named.get(f"un{role}")
            if adapter and adapter.model and (beside is None or find_adapter(beside)):
                named[f"{role} adapter's model"] = adapter.model
        for role, source in named.items():
            for part, value in model_identity(source).items():
                found[f"{role} {part}"] = value
        for g, guide in enumerate(models.guides):
            name = "guide" if len(models.guides) == 1 else f"guide {g}"
            found[f"{name} weight"] = str(float(guide.weight))
            if guide.prompt_template is not None:
                found[f"{name} prompt template"] = guide.prompt_template
        if models.tokenizer is not None:
            parts = model_identity(models.tokenizer)
            found["base tokenizer"] = parts.get("tokenizer") or " ".join(parts.values())
        if models.prompt_template is not None:
            found["base prompt template"] = models.prompt_template
        if models.remote is not None:
            found["base server"] = models.remote.url
            found["base model"] = models.remote.model or "the only one"
            found["base route"] = models.remote.route
            if models.remote.extra_body:
                found["base fields"] = json.dumps(dict(models.remote.extra_body), sort_keys=True)

        def dtype_on(device: str) -> str:
            where = pick_device(device)
            picked = pick_dtype(dtype, where)
            if picked is not None:
                return str(picked).removeprefix("torch.")
            half = read_as(torch.float32, where) is not torch.float32
            return "checkpoint's, float32 as bfloat16" if half else "checkpoint's"

        found["dtype"] = dtype_on(device)
        elsewhere = {dtype_on(g.device) for g in models.guides if g.device is not None}
        if elsewhere - {found["dtype"]}:
            found["guides' dtype"] = ", ".join(sorted(elsewhere))
        found["w2s-fast"] = __version__
        for package in ("torch", "transformers"):
            found[package] = version(package).split("+")[0]  # behind it: for which device
    return found


def name_models(
    base: str | None = None,
    tuned: Sequence[str] = (),
    untuned: Sequence[str] = (),
    weights: Sequence[float] = (),
    *,
    tokenizer: str | None = None,
    prompt_template: str | None = None,
    guide_templates: Sequence[str] = (),
    guide_device: str | None = None,
    remote: RemoteBase | None = None,
) -> Models:
    """Checks what the user named against itself; the bundled models if that is nothing.

    Raises:
        typer.BadParameter: a base without its guides' partners, or the other way round.
    """
    if remote is not None and base is not None:
        raise typer.BadParameter("--base and --base-url: there is one base")
    if remote is not None and tokenizer is not None:
        raise typer.BadParameter("--tokenizer is of a base that runs here, not of a server's")
    if base is None and not tuned and not untuned:
        models = _bundled(weights)
    elif remote is not None:
        models = Models("", _named_guides(tuned, untuned, weights))
    else:
        models = Models(_named_base(base), _named_guides(tuned, untuned, weights))
    if guide_templates and len(guide_templates) not in (1, len(models.guides)):
        raise typer.BadParameter(
            f"{len(guide_templates)} --guide-prompt-template for {len(models.guides)} guides"
        )
    if guide_templates:
        each = cycle(guide_templates)
        guides = [g._replace(prompt_template=text) for g, text in zip(models.guides, each)]
        models = replace(models, guides=tuple(guides))
    if guide_device is not None:
        guides = [guide._replace(device=guide_device) for guide in models.guides]
        models = replace(models, guides=tuple(guides))
    if remote is not None:
        models = replace(models, base=remote.model or remote.url, remote=remote)
    return replace(models, tokenizer=tokenizer, prompt_template=prompt_template)


def _named_base(base: str | None) -> str:
    if base is None:
        raise typer.BadParameter("--tuned and --untuned steer a base: name it with --base")
    return base


def _named_guides(
    tuned: Sequence[str], untuned: Sequence[str], weights: Sequence[float]
) -> tuple[GuideNames, ...]:
    if len(tuned) != len(untuned):
        raise typer.BadParameter(
            f"each --tuned needs its --untuned ({NO_MODEL}: it has none), and the other way round"
        )
    if weights and len(weights) != len(tuned):
        raise typer.BadParameter(f"{len(weights)} --weight for {len(tuned)} guides")
    factors = weights or [1.0] * len(tuned)
    partners = [None if name == NO_MODEL else name for name in untuned]
    return tuple(map(GuideNames, tuned, partners, factors))


def _bundled(weights: Sequence[float]) -> Models:
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
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Engine:
    """Loads the models, saying on standard error when they are the bundled ones, and in a terminal
    what each of others is.

    ``tokenizer``: the base's, where it is read already. ``options``: more of the engine's.
    """
    if models.bundled and not quiet:
        which = "guides" if models.remote else "demo models"
        note(f"no model named: using the bundled {which} (film, book and restaurant reviews)")
    quiet_transformers(_bars(models))
    if models.remote is not None:
        show_warnings_as_notes()
    with loading(_bars(models)):
        import torch

        from w2s_fast import Engine, Guide

        take_usable_cores()
        if models.bundled and chosen_count() is None:
            # Their operations are too small to share. On two busy cores, where threads wait for
            # one another, two of them took 8 to 14 times as long as one.
            torch.set_num_threads(1)
        engine = Engine(
            base=models.remote or models.base,
            guides=[Guide(**names._asdict()) for names in models.guides] or None,
            tokenizer=tokenizer or _named_tokenizer(models),
            prompt_template=models.prompt_template,
            device=device,
            dtype=dtype,
            kv_cache_tokens=kv_cache_tokens,
            **options,
        )
    if engine.server is not None and not quiet:
        note(engine.server)
    return engine


def read_tokenizer(models: Models) -> PreTrainedTokenizerBase | None:
    """The base's, before anything is loaded; None: it has none, or that is for the loading to say.

    Raises:
        UnsupportedModel: there is none where ``--tokenizer`` leads.
    """
    if models.remote is not None:
        return None
    quiet_transformers(_bars(models))
    with note_console().status("reading the tokenizer"):
        from w2s_fast.models import load_tokenizer

        if models.tokenizer is not None:
            return _named_tokenizer(models)
        try:
            return load_tokenizer(models.base)
        except W2SFastError:
            return None


def _named_tokenizer(models: Models) -> PreTrainedTokenizerBase | None:
    from w2s_fast.models import load_tokenizer

    if models.tokenizer is None:
        return None
    tokenizer = load_tokenizer(models.tokenizer)
    if tokenizer is None:
        raise UnsupportedModel(f"--tokenizer {models.tokenizer}: there is no tokenizer")
    return tokenizer


def _bars(models: Models) -> bool:
    """Whether somebody sees the loading, and it may take a while."""
    return not models.bundled and note_console().is_terminal


def decoder(engine: Engine) -> Decode:
    """Token ids to text, without special tokens; to a list of numbers if there is no tokenizer."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        return str
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
