"""Whether the files that a user names can be read and written; before anything else is done."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from w2s_fast.errors import InvalidRequest

STANDARD_INPUT = Path("-")


def is_parquet(path: Path) -> bool:
    """By its name: a file, or a folder of them."""
    return path.suffix == ".parquet"


def check_input(path: Path) -> None:
    """Whether lines can be read there. Opens nothing: it may be a pipe.

    ``path``: :data:`STANDARD_INPUT` is no file of that name.

    Raises:
        InvalidRequest: it is a folder.
        OSError: names the file that is missing or cannot be read.
    """
    if path == STANDARD_INPUT:
        return
    if stat.S_ISDIR(path.stat().st_mode) and not is_parquet(path):
        raise InvalidRequest(f"--input {path} is a folder; allowed: a file of JSON lines")
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def check_output(path: Path, input: Path, resume: bool) -> None:
    """Whether records can be written there.

    Raises:
        InvalidRequest: it exists and is not to be gone on with, or it is no regular file.
        OSError: names the folder that is missing, or what cannot be written.
    """
    if not path.exists():
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
        return
    mode = path.stat().st_mode
    if is_parquet(path):
        _check_parquet_output(path, input, resume)
        return
    if not stat.S_ISREG(mode) or str(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
        raise InvalidRequest(
            f"--output {path} is a {kind}; allowed: a regular file, or no --output: then records "
            "go to standard output"
        )
    piped = input == STANDARD_INPUT
    if not piped and path.samefile(input):
        raise InvalidRequest(f"--input and --output are the same file, {path}")
    if not resume:
        raise already_there(path)
    if piped or not stat.S_ISREG(input.stat().st_mode):
        raise InvalidRequest(f"--resume reads its input twice, and {input} is not a file")
    if not os.access(path, os.R_OK | os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _check_parquet_output(path: Path, input: Path, resume: bool) -> None:
    if not path.is_dir():
        raise InvalidRequest(f"--output {path} is no folder, which an output of Parquet is")
    if input != STANDARD_INPUT and path.samefile(input):
        raise InvalidRequest(f"--input and --output are the same folder, {path}")
    if not resume:
        raise already_there(path)
    if input == STANDARD_INPUT:
        raise InvalidRequest(f"--resume reads its input twice, and {input} is not a file")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def already_there(path: Path) -> InvalidRequest:
    """The error for an output that exists when nothing is to be resumed."""
    return InvalidRequest(f"{path} exists: --resume goes on with it, another --output spares it")
