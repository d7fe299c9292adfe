"""What the README shows of the server is what comes out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import Running, running
from w2s_fast import Engine, Guide
from w2s_fast.demo import demo_model_paths

README = (Path(__file__).parents[2] / "README.md").read_text()
ADDRESS = "http://localhost:8000"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def bundled() -> Iterator[Running]:
    paths = demo_model_paths()
    engine = Engine(paths.base, Guide(paths.tuned, paths.untuned), kv_cache_tokens=16384)
    with running(engine, name="bundled") as found:
        yield found


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_call_of_curl(bundled: Running) -> None:
    (shown,) = re.findall(r"\$ (curl .*?\}')\n(\{.*?\})\n```", README, re.DOTALL)
    command = shlex.split(shown[0].replace("\\\n", " ").replace(ADDRESS, bundled.url))
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    told = json.loads(re.sub(r"\n", lambda m: _space_at(shown[1], m.start()), shown[1]))
    for answer in (found, told):  # what is another each time
        for name in ("id", "created"):
            del answer[name]
        for choice in answer["choices"]:
            choice["score"] = pytest.approx(choice["score"], abs=1e-3)
    assert told["choices"][0]["text"] == found["choices"][0]["text"]
    assert told["usage"] == found["usage"] and told["w2s"] == found["w2s"]
    assert set(told) == set(found) and set(told["choices"][0]) == set(found["choices"][0])


def _space_at(text: str, place: int) -> str:
    """What a line's end stands for: within a string a space was there, elsewhere nothing."""
    return " " if text[:place].count('"') % 2 else ""


def test_the_call_of_the_openai_package(
    bundled: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(from openai .*?)```", README, re.DOTALL)
    exec(block.replace(ADDRESS, bundled.url), {"__name__": "__main__"})
    assert f"# {capsys.readouterr().out.strip()}" == block.strip().splitlines()[-1]
