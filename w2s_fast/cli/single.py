"""One prompt: its answer while it grows, and what the search took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from w2s_fast.cli.console import note, note_console, out_console
from w2s_fast.cli.growing import Growing, printable
from w2s_fast.cli.models import Decode
from w2s_fast.cli.pace import Pace, clock
from w2s_fast.params import SearchParams
from w2s_fast.result import SearchResult

if TYPE_CHECKING:
    from w2s_fast import Engine


def search_shown(
    engine: Engine, prompt: Any, params: SearchParams, *, before: str = "", text: bool = True
) -> SearchResult:
    """The result of one prompt. In a terminal its certain text is shown while it grows.

    What is certain when the user interrupts it is printed.

    Args:
        before: what stands before the answer. text: whether the answer is to be seen at all.
    """
    pace = Pace(engine.stats, total=1)
    pace.expect(params)

    def said() -> str:
        left = pace.seconds_left
        if left is None:
            return "reading the prompt"
        most = f"at most {clock(left)} left"
        return f"round {pace.round}, {pace.tokens_per_s:,.0f} tokens/s sampled, {most}"

    out = out_console() if text else None
    certain = ""
    try:
        with Growing(out, note_console(), said, before) as growing:
            for piece in engine.stream(prompt, params):
                if piece.result is not None:
                    return piece.result
                certain += piece.text or ""
                growing.add(piece.text or "")
    except KeyboardInterrupt:
        if text and certain:
            print_text(before, certain)
        note("interrupted: what stands here was certain" if text and certain else "interrupted")
        raise typer.Exit(130) from None
    raise AssertionError("a stream ends with its result")


def print_answer(prompt: str, result: SearchResult, decode: Decode, seconds: float) -> None:
    """The answers; in a terminal after their prompt, in a pipe alone."""
    for rank, hypothesis in enumerate(result.hypotheses, start=1):
        if len(result.hypotheses) > 1 or note_console().is_terminal:
            value = "" if hypothesis.score is None else f"score {hypothesis.score:+.2f}, "
            note(f"{rank}. {value}{hypothesis.finish_reason}")
        print_text(prompt, hypothesis.text or "")
    if result.trace is not None:
        from w2s_fast.demo import search_tree

        console = out_console()
        tree = search_tree(prompt, result, decode, ascii_only=console.options.ascii_only)
        console.print(tree)
    usage = result.usage
    note(
        f"{usage.completion_tokens} tokens in the answer, {usage.sampled_tokens} sampled, "
        f"{usage.scored_tokens} scored by each guide, {seconds:.2f} s"
    )
    if (remote := usage.remote) is not None:
        cost = "" if remote.cost is None else f", cost {remote.cost:.6g}"
        note(
            f"{remote.requests} requests to the server: {remote.prompt_tokens} tokens read "
            f"({remote.cached_tokens} of them cached), {remote.completion_tokens} sampled{cost}"
        )
    if result.ended_early is not None:
        note(f"ended early: {result.ended_early}", style="yellow")


def print_text(prompt: str, text: str) -> None:
    console = out_console()
    if console.is_terminal:
        console.print(Text.assemble((prompt, "dim"), printable(text)), soft_wrap=True)
    else:
        typer.echo(text)
