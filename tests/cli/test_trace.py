"""`w2s-fast trace`: saved trees as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.command import SMALL, named, records, run, write_lines
from w2s_fast.demo import DemoModels


def data_of(page: Path) -> dict[str, object]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    data: dict[str, object] = json.loads(found[1])
    return data


def test_a_file_of_traces_becomes_a_page(models: DemoModels, tmp_path: Path) -> None:
    asked = write_lines(tmp_path / "in.jsonl", ['{"prompt": "ab", "id": "x"}', '{"prompt": "cd"}'])
    answers = tmp_path / "out.jsonl"
    options = ["--input", asked, "--output", answers, "--trace", *SMALL, *named(models)]
    assert run("generate", *options).exit_code == 0
    base = str(models.base)
    result = run("trace", answers, "--tokenizer", base, "--input", asked)
    assert result.exit_code == 0, result.output
    data = data_of(tmp_path / "out.html")
    assert data["title"] == "out.jsonl"
    searches = data["searches"]
    assert isinstance(searches, list)
    for record in records(answers):
        (own,) = [s for s in searches if s["title"].startswith(record.get("id", "line 2"))]
        first, *rounds, done = own["events"]
        assert first["prompt"] in ("ab", "cd") and done["text"] == record["text"]
        assert [r["kept"] for r in rounds] == [r["kept"] for r in record["trace"]["rounds"]]
    # Another tokenizer would show other words.
    refused = run("trace", answers)
    assert refused.exit_code == 2 and "another tokenizer" in refused.output


@pytest.mark.parametrize(
    ("content", "why"), [("", "no traces"), ('{"index": 0}\n', "no traces"), ("{\n", "line 1")]
)
def test_what_holds_no_trace_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    result = run("trace", path)
    assert result.exit_code == 2 and why in result.output
