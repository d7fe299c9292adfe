"""The output of a run: it grows by whole lines, and can always be gone on with."""

from __future__ import annotations

import errno
import io
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from w2s_fast.cli.jsonl import (
    BadLine,
    Request,
    answer_record,
    bad_line_record,
    encode_record,
    read_requests,
)
from w2s_fast.cli.output_file import OutputFile
from w2s_fast.errors import InvalidRequest, WriteFailed
from w2s_fast.params import SearchParams
from w2s_fast.result import Hypothesis, SearchResult, Usage

MODELS = {"base weights": "a", "dtype": "float32", "torch": "2.13.0"}
USAGE = Usage(prompt_tokens=3, completion_tokens=2, sampled_tokens=32, scored_tokens=32)


def read(*lines: str, made_by: dict[str, str] = MODELS) -> list[Request | BadLine]:
    return list(read_requests([line.encode() for line in lines], SearchParams(), made_by))


def record_of(request: Request | BadLine, text: str = "good") -> dict[str, Any]:
    if isinstance(request, BadLine):
        return bad_line_record(request)
    hypothesis = Hypothesis(text, [1, 2], 0.5, "eos", [0.25, 0.25], [-1.0, -1.0])
    return answer_record(request, SearchResult([hypothesis], USAGE))


INPUT = ['{"prompt": "a"}', "bad", '{"prompt": "b"}', '{"prompt": "c"}']


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The output of a run over INPUT that was interrupted before the last line."""
    path = tmp_path / "out.jsonl"
    with OutputFile.create(path) as file:
        for request in read(*INPUT)[:3]:
            file.write(record_of(request))
    return path


def test_an_existing_output_is_never_overwritten(output: Path) -> None:
    with pytest.raises(InvalidRequest, match="--resume"):
        OutputFile.create(output)


def test_what_is_done_is_not_done_again(output: Path) -> None:
    with OutputFile.resume(output, read(*INPUT), MODELS) as file:
        assert file.done == {0, 1, 2}
        assert (file.failed_before, file.cut_bytes) == (1, 0)
        file.write(record_of(read(*INPUT)[3]))
    assert [json.loads(line)["index"] for line in output.open()] == [0, 1, 2, 3]


@pytest.mark.parametrize("left", [1, 5, 12, 60])
def test_a_half_written_last_line_is_cut_off(output: Path, left: int) -> None:
    whole = output.read_bytes()
    output.write_bytes(whole + encode_record(record_of(read(*INPUT)[3]))[:left])
    with OutputFile.resume(output, read(*INPUT), MODELS) as file:
        assert (file.done, file.cut_bytes) == ({0, 1, 2}, left)
    assert output.read_bytes() == whole


def test_errors_are_kept_unless_they_are_to_be_tried_again(output: Path) -> None:
    with output.open("ab") as file:
        file.write(b'{"index": 3, "te')
    with OutputFile.resume(output, read(*INPUT), MODELS, retry_errors=True) as resumed:
        assert (resumed.done, resumed.failed_before, resumed.cut_bytes) == ({0, 2}, 0, 16)
        resumed.write(record_of(read(*INPUT)[3]))
    assert [json.loads(line)["index"] for line in output.open()] == [0, 2, 3]
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(
    "lines", [[*INPUT[:2], '{"prompt": "other"}'], INPUT[:2], [INPUT[1], INPUT[0]]]
)
def test_another_runs_output_is_refused_and_stays_as_it_is(output: Path, lines: list[str]) -> None:
    with output.open("ab") as file:
        file.write(b'{"index": 3, "te')
    before = output.read_bytes()
    with pytest.raises(InvalidRequest, match="cannot resume"):
        OutputFile.resume(output, read(*lines), MODELS, retry_errors=True)
    assert output.read_bytes() == before


@pytest.mark.parametrize("text", [b"my notes", b"my notes\n", b"[1]\n", b'{"a": 1}\n'])
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(
    tmp_path: Path, text: bytes
) -> None:
    path = tmp_path / "notes"
    path.write_bytes(text)
    with pytest.raises(InvalidRequest, match="no record"):
        OutputFile.resume(path, read(*INPUT), MODELS)
    assert path.read_bytes() == text


def test_two_processes_do_not_write_one_output(output: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from w2s_fast.cli.output_file import OutputFile\n"
        "OutputFile.resume(Path(sys.argv[1]), [], {})"
    )
    with OutputFile.resume(output, read(*INPUT), MODELS):
        answer = subprocess.run(
            [sys.executable, "-c", script, str(output)], capture_output=True, text=True, check=False
        )
    assert "being written by another process" in answer.stderr


# --- what a crash of the machine leaves


@pytest.mark.parametrize("left", ["", '{"ind', '{"index": 3, "text": "go'])
@pytest.mark.parametrize("zeros", [1, 5000, 3 << 20])
def test_zeros_at_the_end_are_cut_off(output: Path, left: str, zeros: int) -> None:
    whole = output.read_bytes()
    with output.open("ab") as file:
        file.write(left.encode())
        file.truncate(len(whole) + len(left) + zeros)
    with OutputFile.resume(output, read(*INPUT), MODELS) as file:
        assert (file.done, file.cut_bytes) == ({0, 1, 2}, len(left) + zeros)
        file.write(record_of(read(*INPUT)[3]))
    assert [json.loads(line)["index"] for line in output.open()] == [0, 1, 2, 3]


def test_zeros_within_the_last_line_are_cut_off_with_it(output: Path) -> None:
    whole = output.read_bytes()
    record = encode_record(record_of(read(*INPUT)[3]))
    output.write_bytes(whole + record[:20] + b"\0" * 30 + record[50:])
    with OutputFile.resume(output, read(*INPUT), MODELS) as file:
        assert (file.done, file.cut_bytes) == ({0, 1, 2}, len(record))
    assert output.read_bytes() == whole


def test_zeros_before_other_lines_are_no_crash_of_ours(output: Path) -> None:
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + b"\0" * 30 + lines[1])
    with pytest.raises(InvalidRequest, match=r"line 2 .* is no record"):
        OutputFile.resume(output, read(*INPUT), MODELS)


# --- made by others


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({**MODELS, "base weights": "b"}, "base weights: a then, b now"),
        ({**MODELS, "torch": "3", "dtype": "x"}, "dtype: float32 then, x now; torch: 2.13.0 then"),
        ({**MODELS, "guide weight": "1.0"}, "guide weight: none then, 1.0 now"),
        ({"dtype": "float32", "torch": "2.13.0"}, "base weights: a then, none now"),
    ],
)
def test_what_was_made_by_others_is_refused_and_it_says_what_differs(
    output: Path, others: dict[str, str], told: str
) -> None:
    before = output.read_bytes()
    with pytest.raises(InvalidRequest, match=told):
        OutputFile.resume(output, read(*INPUT, made_by=others), others)
    assert output.read_bytes() == before


def test_an_output_that_does_not_say_what_made_it_is_refused(output: Path) -> None:
    old = [json.loads(line) for line in output.open()]
    for record in old:
        del record["made_by"]
    output.write_bytes(b"".join(map(encode_record, old)))
    with pytest.raises(InvalidRequest, match="an earlier version of w2s-fast"):
        OutputFile.resume(output, read(*INPUT), MODELS)


# --- a full disk


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_written_before_the_disk_was_full_is_whole(output: Path) -> None:
    whole = output.read_bytes()
    with (
        pytest.raises(WriteFailed, match=f"{output}: File too large; .* --resume goes on"),
        OutputFile.resume(output, read(*INPUT), MODELS) as file,
        room_for(len(whole) + 20),
    ):
        file.write(record_of(read(*INPUT)[3]))
    assert output.read_bytes() == whole


def test_a_full_disk_takes_no_record_away_when_errors_are_tried_again(output: Path) -> None:
    whole = output.read_bytes()
    with room_for(20), pytest.raises(WriteFailed, match="its answers are all there"):
        OutputFile.resume(output, read(*INPUT), MODELS, retry_errors=True)
    assert output.read_bytes() == whole
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_space_left_is_an_error_that_says_so() -> None:
    path = Path("/dev/full")
    file = OutputFile(path, path.open("wb", buffering=0))
    with pytest.raises(WriteFailed, match="No space left on device"):
        file.write({"index": 0})


class ClosesBadly(io.FileIO):
    """As files on a network do, which learn only then that there is no room."""

    def close(self) -> None:
        if not self.closed:
            super().close()
            raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_file_that_cannot_be_closed_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        pytest.raises(WriteFailed, match="Disk quota exceeded"),
        OutputFile(path, ClosesBadly(path, "xb")) as file,
    ):
        file.write({"index": 0})


# --- the file itself


def test_a_new_output_that_got_no_record_is_gone_when_the_run_fails(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyError), OutputFile.create(path):
        raise KeyError
    assert not path.exists()


def test_an_output_that_got_a_record_stays_when_the_run_fails(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    def run() -> None:
        with OutputFile.create(path) as file:
            file.write({"index": 0})
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert path.read_bytes() == b'{"index": 0}\n'


def test_a_link_stays_a_link_and_modes_stay_when_errors_are_tried_again(output: Path) -> None:
    output.chmod(0o640)
    link = output.with_name("link.jsonl")
    link.symlink_to(output)
    precious = output.with_name("link.jsonl.part")
    precious.write_text("somebody's")
    with OutputFile.resume(link, read(*INPUT), MODELS, retry_errors=True) as file:
        file.write(record_of(read(*INPUT)[3]))
    assert link.is_symlink()
    assert output.stat().st_mode & 0o777 == 0o640
    assert [json.loads(line)["index"] for line in output.open()] == [0, 2, 3]
    assert precious.read_text() == "somebody's"
