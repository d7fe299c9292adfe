"""`w2s-fast doctor`: one verdict a line."""

from __future__ import annotations

import typer
from rich.text import Text

from w2s_fast.cli.console import out_console, quiet_transformers
from w2s_fast.cli.examine import examine

STYLES = {"ok": "green", "none": "yellow", "bad": "bold red"}


def doctor() -> None:
    """Say what this machine has, which path will run, and whether it computes right.

    Verdicts: ok; none (absent, and nothing needs it); bad. Exit code 1 if anything is bad.
    """
    quiet_transformers()
    console = out_console()
    bad = []
    for finding in examine():
        if finding.verdict == "bad":
            bad.append(finding.name)
        verdict = (f"{finding.verdict:<5}", STYLES[finding.verdict])
        line = Text.assemble(verdict, (f"{finding.name:<17}", "bold"), finding.detail)
        console.print(line, soft_wrap=True)
    if bad:
        console.print(f"not well: {', '.join(bad)}", style="bold red")
        raise typer.Exit(1)
    console.print("all well", style="green")
