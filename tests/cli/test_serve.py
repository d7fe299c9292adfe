"""`w2s-fast serve`: its options and its file; what is refused before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch

from bench.serving import served
from tests.support.command import run
from tests.support.tiny_models import save_tiny


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("port: 1\nhots: x\n", "unknown: hots"),
        ("- a\n", "no mapping"),
        ("a: [\n", "config"),
        ("search: {beam_size: 3}\n", "beam_size"),
        ("search: {n: 9, beam_width: 2}\n", "n is 9"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(content)
    result = run("serve", "--config", path)
    assert result.exit_code == 2 and why in result.output


def test_searches_by_name_and_value() -> None:
    for given, why in (
        ("beam_width", "NAME=VALUE"),
        ("width=3", "NAME=VALUE"),
        ("n=[", "cannot be read"),
        ("temperature=-1", "temperature is -1"),
    ):
        result = run("serve", "--search", given)
        assert result.exit_code == 2 and why in result.output, result.output


def test_weights_as_pickles_are_refused_unless_asked_for(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    result = run("serve", "--base", folder)
    assert result.exit_code == 2 and "--allow-pickles" in result.output


@pytest.mark.long
def test_it_serves_what_the_file_and_the_command_line_say(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny-model")
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = tmp_path / "server.yaml"
    config.write_text(
        f"base: {folder}\nsearch: {{max_new_tokens: 7, n: 2}}\nmax-queue: 3\n"
        "api-key: secret\nname: other\n"
    )
    arguments = ["--config", str(config), "--name", "mine", "--chat-template", str(template)]
    with served(arguments) as (url, _), httpx2.Client(base_url=url, timeout=60) as http:
        # One key, and not one for each of its letters.
        http.headers["authorization"] = "Bearer s"
        assert http.get("/v1/models").status_code == 401
        http.headers["authorization"] = "Bearer secret"
        (model,) = http.get("/v1/models").json()["data"]
        assert model["id"] == "mine"
        body = {"prompt": "ab", "ignore_eos": True}
        found = http.post("/v1/completions", json=body).json()
        assert len(found["choices"]) == 2 and found["usage"]["completion_tokens"] == 14
        messages = [{"role": "user", "content": "ab"}]
        answer = http.post("/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 2


def test_without_its_packages_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from w2s_fast.cli import app\napp(['serve', '--port', '0'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2 and "pip install w2s-fast[serve]" in found.stderr
    assert "Traceback" not in found.stderr
