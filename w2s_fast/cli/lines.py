"""The lines of a file, as bytes, none longer than memory allows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

# A prompt of a million token ids takes 8 MB.
MAX_LINE_BYTES = 32 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class LongLine:
    """What is kept of a line that was too long: its length in bytes, and a hash of it."""

    length: int
    digest: str


def read_lines(file: BinaryIO, limit: int = MAX_LINE_BYTES) -> Iterator[bytes | LongLine]:
    """Lines as they are asked for, with their ends; of a line over ``limit`` bytes, none is kept.

    A byte-order mark at the beginning of the file is left out.
    """
    beginning = True
    while line := file.readline(limit + 1):
        if beginning:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            beginning = False
        yield line if len(line) <= limit or line.endswith(b"\n") else _pass_over(file, line, limit)


def _pass_over(file: BinaryIO, start: bytes, limit: int) -> LongLine:
    digest, length, piece = hashlib.sha256(start), len(start), start
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(limit)
        digest.update(piece)
        length += len(piece)
    return LongLine(length, digest.hexdigest())
