"""Parquet in and out: rows say what lines say, and an output is gone on with, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import SMALL, records, run, write_lines
from w2s_fast.cli.jsonl import Request, answer_record, read_requests
from w2s_fast.cli.parquet import ParquetOutput
from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams
from w2s_fast.result import Hypothesis, SearchResult, Usage

pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS: list[dict[str, Any]] = [
    {"prompt": "The film", "seed": None, "id": "a", "messages": None},
    {"prompt": "The book", "seed": 3, "id": None, "messages": None},
    {"prompt": None, "seed": None, "id": "c", "messages": None},
]
MODELS = {"base weights": "a", "torch": "2"}


def rows(folder: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: row["index"])


def test_rows_are_answered_as_lines_are(tmp_path: Path) -> None:
    lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in ROWS]
    plain, given = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), given)
    of_lines, of_rows = tmp_path / "out.jsonl", tmp_path / "out.parquet"
    assert run("generate", "--input", plain, "--output", of_lines, *SMALL).exit_code == 1
    assert run("generate", "--input", given, "--output", of_rows, *SMALL).exit_code == 1
    found = rows(of_rows)
    for row, record in zip(found, records(of_lines), strict=True):
        for name in ("index", "id", "text", "token_ids", "score", "fingerprint", "error"):
            assert row[name] == record.get(name), name
        assert dict(row["made_by"]) == record["made_by"]
    assert found[2]["error"]["type"] == "InvalidRequest"
    again = run("generate", "--input", given, "--output", of_rows, *SMALL)
    assert again.exit_code == 2 and "--resume" in again.stderr
    again = run("generate", "--input", given, "--output", of_rows, "--resume", *SMALL)
    assert "3 lines are in" in again.stderr and rows(of_rows) == found


def requests(count: int, made_by: dict[str, str] = MODELS) -> list[Request]:
    lines = [json.dumps({"prompt": str(i)}).encode() for i in range(count)]
    return [r for r in read_requests(lines, SearchParams(), made_by) if isinstance(r, Request)]


def record_of(request: Request, error: bool = False) -> dict[str, Any]:
    hypothesis = Hypothesis("good", [1, 2], 0.5, "eos", [0.25, 0.25], [-1.0, -1.0])
    result = SearchResult([] if error else [hypothesis], Usage(3, 2, 32, 32))
    if error:
        result = SearchResult([], Usage(0, 0, 0, 0), error=InvalidRequest("no"))
    return answer_record(request, result)


def test_it_can_be_read_while_it_grows_and_what_waits_is_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2s_fast.cli.parquet._ROWS", 2)
    path = tmp_path / "out.parquet"

    def interrupted() -> None:
        with ParquetOutput.create(path) as output:
            for request in requests(5):
                output.write(record_of(request))
            assert [row["index"] for row in rows(path)] == [0, 1, 2, 3]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [row["index"] for row in rows(path)] == [0, 1, 2, 3, 4]


def test_what_is_done_is_not_done_again_and_errors_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with ParquetOutput.create(path) as output:
        for request in requests(3):
            output.write(record_of(request, error=request.index == 1))
    (path / ".answers-000001.parquet.part").write_bytes(b"half")  # as a crash leaves it
    with ParquetOutput.resume(path, requests(4), MODELS) as output:
        assert (output.done, output.failed_before, output.cut_bytes) == ({0, 1, 2}, 1, 4)
    with ParquetOutput.resume(path, requests(4), MODELS, retry_errors=True) as output:
        assert (output.done, output.failed_before, output.cut_bytes) == ({0, 2}, 0, 0)
        output.write(record_of(requests(4)[1]))
        output.write(record_of(requests(4)[3]))
    assert [(row["index"], row["error"]) for row in rows(path)] == [(i, None) for i in range(4)]


def test_another_runs_output_is_refused_and_a_failed_run_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with pytest.raises(KeyError), ParquetOutput.create(path):
        raise KeyError
    assert not path.exists()
    with ParquetOutput.create(path) as output:
        output.write(record_of(requests(1)[0]))
        with pytest.raises(InvalidRequest, match="by another process"):
            ParquetOutput.resume(path, requests(1), MODELS)
    others = {**MODELS, "torch": "3"}
    with pytest.raises(InvalidRequest, match="torch: 2 then, 3 now"):
        ParquetOutput.resume(path, requests(1, others), others)
    with pytest.raises(InvalidRequest, match="not in the input"):
        ParquetOutput.resume(path, [], MODELS)
    pq.write_table(pa.table({"x": [1]}), path / "answers-000009.parquet")
    with pytest.raises(InvalidRequest, match="no output of w2s-fast"):
        ParquetOutput.resume(path, requests(1), MODELS)


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    given = tmp_path / "in.parquet"
    given.write_text("text")
    told = run("generate", "--input", given, *SMALL)
    assert told.exit_code == 2 and "is no Parquet" in told.stderr
