"""The `w2s-fast` command. Each subcommand is one file of this room."""

from __future__ import annotations

from typing import Annotated

import typer

from w2s_fast.cli.console import Commands
from w2s_fast.cli.demo import demo
from w2s_fast.cli.doctor import doctor
from w2s_fast.cli.evaluation import evaluation
from w2s_fast.cli.fetch_models import fetch_models
from w2s_fast.cli.generate import generate
from w2s_fast.cli.serve import serve
from w2s_fast.cli.threads import let_threads_sleep
from w2s_fast.cli.trace import trace

app = typer.Typer(
    name="w2s-fast",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Weak-to-strong search: a large frozen model writes, two small models steer.",
)
for command in (demo, generate, serve, trace, fetch_models, doctor):
    app.command()(command)
app.add_typer(evaluation, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"w2s-fast {version('w2s-fast')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    let_threads_sleep()
