"""Equal prompts get equal answers, and docs/determinism.md says how to get different ones."""

from __future__ import annotations

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "determinism.md"


def test_the_example_of_the_page_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block.split("```")[0] for block in PAGE.read_text().split("```python\n")[1:])
    exec(compile(example, str(PAGE), "exec"), {})
    told = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [words for _, words in told] == ["different answers"] * 3
    equal, seeds, sampled = (int(count) for count, _ in told)
    assert equal == 1
    assert seeds >= 6
    assert sampled >= 6
