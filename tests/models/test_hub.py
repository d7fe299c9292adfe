"""Hub ids where there is no network: at once, and from the cache, or not at all."""

from __future__ import annotations

import http.server
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tests.support.command import SMALL, run
from tests.support.tiny_models import save_tiny
from w2s_fast.errors import UnsupportedModel
from w2s_fast.models import find_files, hub, load_model, load_tokenizer, look_at_model

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def waited(seconds: float) -> None:
        raise AssertionError("somebody waits for another try")

    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_found", None)
    monkeypatch.setattr(time, "sleep", waited)


def cached(root: Path, name: str) -> None:
    """A model in the cache, as a download leaves it there."""
    folder = root / "cache" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    save_tiny(folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567")


def test_an_id_that_is_nowhere_says_what_to_do() -> None:
    for look in (look_at_model, load_tokenizer):
        with pytest.raises(UnsupportedModel, match=f"hub .{NOBODY}. does not answer") as error:
            look("some-one/some-model")
        for told in ("neither a folder nor in the cache", "hf download some-one/some-model"):
            assert told in str(error.value)


def test_the_command_says_it_in_a_line_before_anything_is_loaded() -> None:
    options = ["--base", "some-one/some-model", "--method", "sample", *SMALL]
    for arguments in (["x"], ["x", "--json"], ["x", "--chat"], ["--input", "-"]):
        result = run("generate", *arguments, *options, stdin='{"prompt": "x"}')
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()
        assert (
            line.startswith("error: model 'some-one/some-model' is neither") and "HF_HOME" in line
        )


def test_where_the_user_is_off_line_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnsupportedModel, match="HF_HUB_OFFLINE is set"):
        find_files("some-model")


def test_what_is_in_the_cache_is_loaded_without_the_hub(tmp_path: Path) -> None:
    cached(tmp_path, "some-one/some-model")
    assert find_files("some-one/some-model").hub_id == "some-one/some-model"
    assert load_model("some-one/some-model", CPU, "auto").config.model_type == "llama"
    tokenizer = load_tokenizer("some-one/some-model")
    assert tokenizer is not None and tokenizer.bos_token == "<bos>"
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UnsupportedModel, match="neither"):
        find_files("some-one/some-model")


def test_paths_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "get_session", asked)
    assert find_files(save_tiny(tmp_path / "here")).hub_id is None
    for path in (tmp_path / "none", "./none", "~/none", "a/b/c"):
        with pytest.raises(UnsupportedModel, match="there is no such folder"):
            look_at_model(path)


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_that_answers_is_left_to_its_client(
    refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", refusing)
    assert find_files("some-one/some-model") == ("some-one/some-model", None, None)
