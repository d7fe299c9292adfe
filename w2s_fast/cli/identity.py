"""What tells a model from others: its files' contents, by samples, wherever they lie.

Names, places and times do not count: a copied folder is the same model. Weights are told apart by
their sizes and by three blocks of every tensor, so that a checkpoint of any size takes a moment.
"""

from __future__ import annotations

import hashlib
import json
import os
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

_BLOCK = 4096  # bytes
_PARTS = 1024  # of a file that does not say where its tensors lie
_MAX_HEADER = 100_000_000  # bytes; safetensors allows no more
_GGUF_WORDS = 1 << 26  # bytes that a GGUF file's settings and vocabulary stay below

_CONFIG = ("config.json", "generation_config.json", "adapter_config.json")
_TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*", "*.model", "*.tiktoken", "tekken.json"),
)


def model_identity(source: str) -> dict[str, str]:
    """Parts of what a model is: ``weights``, ``config`` and ``tokenizer`` of a folder, each a short
    hash; the ``file`` of a GGUF; the ``commit`` of a hub id.

    Raises:
        OSError: names the file that cannot be read. That there is none is left to the loading.
        UnsupportedModel: there are several GGUF files, or a path to one that does not exist; or a
            hub id that neither the hub nor the cache knows.
    """
    from w2s_fast.models import find_files

    where = find_files(source)
    if where.gguf is not None:
        return {"file": _gguf_digest(Path(where.path))}
    if where.hub_id is not None:  # the cache's folder is named by its commit
        return {"commit": Path(where.name).name}
    if not os.path.isdir(where.name):
        return {"commit": _commit(source)}
    folder = Path(where.name)
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    named = {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}
    weights = [name for name in named if name.endswith(".safetensors")]
    weights = weights or [name for name in named if name.endswith(".bin")]
    kinds = {
        "weights": weights,
        "config": [name for name in named if name in _CONFIG],
        "tokenizer": [name for name in named if any(fnmatch(name, each) for each in _TOKENIZER)],
    }
    found = {}
    for kind, names in kinds.items():
        digest = hashlib.sha256()
        for name in sorted(names):
            digest.update(name.encode() + b"\0" + _digest(named[name], kind == "weights"))
        found[kind] = digest.hexdigest()[:8]
    return found


def _commit(name: str) -> str:
    from huggingface_hub import hf_hub_download

    for file in ("config.json", "adapter_config.json"):
        try:  # what the loading asks for first, too; it lies in a folder named by its commit
            return Path(hf_hub_download(name, file)).parent.name
        except Exception:
            continue
    return "unknown"  # the loading says what is wrong


def _gguf_digest(path: Path) -> str:
    """Of the beginning whole, of the weights behind it by samples."""
    with path.open("rb") as file:
        words = hashlib.sha256(file.read(_GGUF_WORDS))
    words.update(_digest(path, by_samples=True))
    return words.hexdigest()[:8]


def _digest(path: Path, by_samples: bool) -> bytes:
    if not by_samples:
        return hashlib.sha256(path.read_bytes()).digest()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(b"%d" % size)
        for begin, end in _tensors(file, size) or _equal_parts(size):
            blocks = {max(begin, at) for at in (begin, (begin + end - _BLOCK) // 2, end - _BLOCK)}
            for offset in sorted(blocks):
                digest.update(os.pread(file.fileno(), min(_BLOCK, end - offset), offset))
    return digest.digest()


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Where the header's blocks and the tensors of a safetensors file lie; nothing of others."""
    length = int.from_bytes(file.read(8), "little")
    data = 8 + length
    if data > min(size, _MAX_HEADER):
        return []
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        parts = [
            (data + begin, data + end)
            for begin, end in (tensor["data_offsets"] for tensor in header.values())
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [(i, min(i + _BLOCK, data)) for i in range(0, data, _BLOCK)] + sorted(parts)


def _equal_parts(size: int) -> list[tuple[int, int]]:
    bounds = [size * i // _PARTS for i in range(_PARTS + 1)]
    return list(pairwise(bounds))
