"""What `generate` refuses before any model is loaded: by its options, and by tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from w2s_fast.cli.models import Models, read_tokenizer
from w2s_fast.errors import InvalidRequest, MismatchedVocabulary, UnsupportedModel
from w2s_fast.params import SearchParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REMOTE_METHODS = ("cbs", "bon", "sample")


def check_usage(
    prompt: str | None,
    input: Path | None,
    output: Path | None,
    resume: bool,
    retry_errors: bool,
    ray: bool = False,
    actors: int | None = None,
) -> None:
    """Whether the options go together.

    Raises:
        typer.BadParameter: they do not; says which goes with which.
    """
    if (prompt is None) == (input is None):
        raise typer.BadParameter("give a PROMPT or an --input file, one of the two")
    if output is not None and input is None:
        raise typer.BadParameter("--output goes with --input")
    if resume and output is None:
        raise typer.BadParameter("--resume goes on with an --output file: name it")
    if retry_errors and not resume:
        raise typer.BadParameter("--retry-errors goes with --resume")
    if ray and input is None:
        raise typer.BadParameter("--ray goes with --input")
    if actors is not None and not ray:
        raise typer.BadParameter("--actors goes with --ray")
    if actors is not None and actors < 1:
        raise typer.BadParameter(f"--actors is {actors}; allowed: an integer >= 1")
    try:
        (prompt or "").encode("utf-8")
    except UnicodeEncodeError:
        raise typer.BadParameter("the prompt is not UTF-8") from None


def check_models(params: SearchParams, models: Models) -> None:
    """Whether the models that are named can do what is asked of them.

    Raises:
        typer.BadParameter: there are no guides to steer by.
        InvalidRequest: the guides are not of the kind that the method needs, or their number is
            not that of ``beta``.
    """
    if params.uses_guides and not models.guides:
        raise typer.BadParameter("steering needs --tuned and --untuned, or --method sample or beam")
    if params.fuses == "dynamic_fusion" and any(g.untuned is None for g in models.guides):
        raise InvalidRequest(
            "dynamic_fusion compares a guide's tuned model with its untuned one; allowed: "
            "guides that have both"
        )
    if models.remote is not None and params.method not in REMOTE_METHODS:
        raise InvalidRequest(
            f"method is {params.method!r}, which needs the base's own tokens; allowed with a "
            f"remote base: {', '.join(REMOTE_METHODS)}"
        )
    if params.fuses is not None:
        params.betas([guide.weight for guide in models.guides])
        if not models.bundled:
            _check_one_vocabulary(models, params.fuses)


def chat_tokenizer(models: Models) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer, for the engine. InvalidRequest: it has no chat template."""
    tokenizer = read_tokenizer(models)
    if tokenizer is not None and tokenizer.chat_template is None:
        raise InvalidRequest(
            f"base ({models.base}) has no chat template, which --chat needs; --prompt-template "
            "puts text around a prompt"
        )
    return tokenizer


def _check_one_vocabulary(models: Models, method: str) -> None:
    """Whether a method can add logits token by token, as far as tokenizers tell.

    InvalidRequest: a guide has another vocabulary than the base; says where they differ.
    """
    base = read_tokenizer(models)
    if base is None:
        return
    from w2s_fast.models import load_tokenizer
    from w2s_fast.text import check_same_vocabulary

    for guide in models.guides:
        try:
            own = load_tokenizer(guide.tuned)
        except UnsupportedModel:
            continue  # an adapter's folder may have none; else the loading says what is wrong
        try:
            if own is not None:
                check_same_vocabulary(base, own, f"tuned ({guide.tuned})")
        except MismatchedVocabulary as error:
            raise InvalidRequest(
                f"{method} adds logits token by token, so it needs one vocabulary: {error}"
            ) from error
