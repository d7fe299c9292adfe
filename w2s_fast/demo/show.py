"""How the demo's measurements and a search tree look in a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from w2s_fast.demo.measure import Measurement, mean_with_interval
from w2s_fast.result import Candidate, SearchResult, Trace

Decode = Callable[[list[int]], str]

FIRST_ROUNDS, LAST_ROUNDS = 3, 2  # of a long search; the rounds between are folded
BAR_CELLS = 6
SNIPPET = 56  # columns of a candidate's text


class Marks(NamedTuple):
    """Signs of the tree, for terminals with and without Unicode."""

    winner: str
    kept: str
    lost: str
    bar: str
    parent: str


UNICODE = Marks("★", "●", "·", "━", "←")
ASCII = Marks("*", "o", ".", "=", "<")


def results_table(measurements: Sequence[Measurement], ascii_only: bool = False) -> Table:
    """One row a method; the first is what the others' fluency is compared with."""
    table = Table(
        title=f"{len(measurements[0].rewards)} held-out prompts",
        box=box.ASCII2 if ascii_only else box.ROUNDED,
        title_style="bold",
        header_style="bold",
    )
    table.add_column("method")
    table.add_column("gold reward\nmean, 95 % interval", justify="right")
    table.add_column("fluency\nnats a token", justify="right")
    table.add_column("\nagainst base", justify="right")
    table.add_column("answer\ntokens/s", justify="right")
    table.add_column("sampled\ntokens/s", justify="right")
    best = max(measurements, key=lambda m: sum(m.rewards))
    base_fluency = mean_with_interval(measurements[0].fluency).value
    for m in measurements:
        reward, fluency = mean_with_interval(m.rewards), mean_with_interval(m.fluency).value
        change = 100 * (fluency - base_fluency) / abs(base_fluency)
        table.add_row(
            m.method.name,
            reward.shown(ascii_only),
            f"{fluency:.3f}",
            "" if m is measurements[0] else f"{change:+.1f} %",
            f"{m.answer_tokens_per_s:,.0f}",
            f"{m.sampled_tokens_per_s:,.0f}",
            style="bold green" if m is best else "",
        )
    return table


def comparison(better: Measurement, other: Measurement, ascii_only: bool = False) -> str:
    """How much more reward one method got than another, prompt by prompt."""
    gaps = [a - b for a, b in zip(better.rewards, other.rewards, strict=True)]
    gap = mean_with_interval(gaps).shown(ascii_only)
    return f"{better.method.name} against {other.method.name}: {gap}"


def answers_table(prompt: str, measurements: Sequence[Measurement]) -> Table:
    """The methods' answers to the first prompt, and what each is worth."""
    table = Table(box=None, show_header=False, padding=(0, 1), title_justify="left")
    table.add_column(no_wrap=True, style="bold")
    table.add_column(justify="right", no_wrap=True, style="cyan")
    table.add_column()
    for m in measurements:
        answer = Text.assemble((prompt, "dim"), printable(m.results[0].text or ""))
        table.add_row(m.method.name, f"{m.rewards[0]:+.2f}", answer)
    return table


def search_tree(
    prompt: str, result: SearchResult, decode: Decode, ascii_only: bool = False
) -> RenderableType:
    """The rounds of a traced search: candidates, scores, who was kept, and the winner's line.

    Kept candidates have letters, best first; "b ← a" was sampled from the last round's a. Round 1
    shows every candidate; later rounds fold those that were not kept into one line.
    """
    trace = result.trace
    if trace is None or not trace.rounds:
        return Text("no trace: ask for one with SearchParams(trace=True)")
    painter = _Painter(trace, decode, ASCII if ascii_only else UNICODE)
    m = painter.marks
    legend = f"{m.winner} the winner's line  {m.kept} kept  {m.lost} not kept  scores in nats"
    if len(trace.rounds) > 1:
        legend += f"  b {m.parent} a: goes on from the last round's a"
    tree = Tree(Text(prompt, style="bold"), guide_style="dim")
    folded = range(FIRST_ROUNDS, len(trace.rounds) - LAST_ROUNDS)
    for index in range(len(trace.rounds)):
        if len(folded) < 2 or index not in folded:
            branch = tree.add(painter.heading(index))
            for line in painter.lines(index):
                branch.add(line)
        elif index == folded[0]:
            tree.add(Text(f"rounds {folded[0] + 1}-{folded[-1] + 1}: likewise", style="dim"))
    score = "" if result.score is None else f"  (score {result.score:+.2f})"
    answer = Text.assemble(
        (f"{painter.marks.winner} ", "bold green"),
        (prompt, "dim"),
        (printable(result.text or ""), "bold green"),
        (score, "cyan"),
    )
    return Group(Text(legend, style="dim"), tree, answer)


class _Painter:
    """Draws the lines of one trace."""

    def __init__(self, trace: Trace, decode: Decode, marks: Marks) -> None:
        self.rounds = trace.rounds
        self.decode = decode
        self.marks = marks
        self.winners = _lineage(trace)

    def heading(self, index: int) -> Text:
        this = self.rounds[index]
        parents = {c.parent for c in this.candidates}
        source = "the prompt" if None in parents else f"{len(parents)} hypotheses"
        return Text(
            f"round {index + 1}: {len(this.candidates)} candidates from {source}, "
            f"{len(this.kept)} kept",
            style="bold",
        )

    def lines(self, index: int) -> list[Text]:
        this = self.rounds[index]
        lost = [i for i in range(len(this.candidates)) if i not in this.kept]
        lost.sort(key=lambda i: -(this.candidates[i].score or 0.0))
        lines = [self._line(index, i, rank) for rank, i in enumerate(this.kept)]
        if index == 0:
            return lines + [self._line(index, i, None) for i in lost]
        return lines + ([self._folded(index, lost)] if lost else [])

    def _line(self, index: int, i: int, rank: int | None) -> Text:
        candidate = self.rounds[index].candidates[i]
        won = self.winners[index] == i
        mark, style = self.marks.lost, "dim"
        if rank is not None:
            mark = self.marks.winner if won else self.marks.kept
            style = "bold green" if won else ""
        name = " " if rank is None else _letter(rank)
        if index > 0:
            parent = "" if candidate.parent is None else _letter(candidate.parent)
            name = f"{name} {self.marks.parent} {parent}"
        score = "" if candidate.score is None else f"{candidate.score:+7.2f}"
        text = self._new_text(index, candidate)
        line = Text.assemble(
            (f"{mark} {name} ", style), (score, "cyan" if rank is not None else "dim")
        )
        line.append(f" {self._bar(index, candidate):<{BAR_CELLS}} ", style or "cyan")
        line.append(text, style)
        return line

    def _folded(self, index: int, lost: list[int]) -> Text:
        """Candidates that were not kept, best first, in one line."""
        candidates = [self.rounds[index].candidates[i] for i in lost]
        span = ""
        if candidates[0].score is not None and candidates[-1].score is not None:
            span = f", {candidates[0].score:+.2f} to {candidates[-1].score:+.2f}"
        return Text(f"{self.marks.lost} {len(lost)} more{span}", style="dim")

    def _bar(self, index: int, candidate: Candidate) -> str:
        """The score's place between the worst and the best of its round."""
        scores = [c.score for c in self.rounds[index].candidates if c.score is not None]
        if candidate.score is None:
            return ""
        span = max(scores) - min(scores)
        share = (candidate.score - min(scores)) / span if span else 1.0
        return self.marks.bar * max(1, round(share * BAR_CELLS))

    def _new_text(self, index: int, candidate: Candidate) -> str:
        """What this round added, cut to fit a line."""
        before = ""
        if index > 0 and candidate.parent is not None:
            last = self.rounds[index - 1]
            before = self._text_of(last.candidates[last.kept[candidate.parent]])
        text = printable(self._text_of(candidate)[len(before) :])
        if candidate.finish_reason is not None:
            text = f"{text} [{candidate.finish_reason}]" if text else "[finished, held]"
        return text if len(text) <= SNIPPET else text[: SNIPPET - 3] + "..."

    def _text_of(self, candidate: Candidate) -> str:
        return self.decode(candidate.token_ids) if candidate.text is None else candidate.text


def printable(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def _letter(rank: int) -> str:
    return chr(ord("a") + rank) if rank < 26 else str(rank + 1)


def _lineage(trace: Trace) -> list[int]:
    """For each round, the candidate that the winner descends from."""
    winner = trace.rounds[-1].kept[0]
    line = [winner]
    for this, previous in zip(reversed(trace.rounds), reversed(trace.rounds[:-1]), strict=False):
        parent = this.candidates[line[-1]].parent
        line.append(previous.kept[0 if parent is None else parent])
    return line[::-1]
