"""Many clients of a server of its own; some leave, read slowly, or send what is no body."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.serving import main


@pytest.mark.parametrize(
    ("clients", "seconds"),
    [
        pytest.param(30, 5, marks=pytest.mark.long),
        pytest.param(200, 60, marks=pytest.mark.thorough),
    ],
)
def test_every_answer_is_the_one_of_its_seed_alone(
    clients: int, seconds: int, tmp_path: Path
) -> None:
    out = tmp_path / "serving.json"
    arguments = ["--clients", str(clients), "--seconds", str(seconds), "--out", str(out)]
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    assert not found["wrong"] and found["exit code after it"] == 0
    assert found["outcomes"]["answered"] > 0 and found["outcomes"]["left"] > 0
    assert not [name for name in found["outcomes"] if name.startswith("lost")]
    assert found["/ready and a body after it"] == [503, 503]
