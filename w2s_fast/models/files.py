"""Which files a model is read from: those of a folder or a hub id, or one GGUF file."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

from w2s_fast.errors import UnsupportedModel
from w2s_fast.models.hub import cached_only

_GGUF = ".gguf"
_NEEDED = ("gguf", "accelerate")  # by transformers, for any GGUF file
# Up to 5.22 tokenizers of byte-level vocabularies came without the BOS that the file asks for, in
# 5.17 with a wrong EOS, too.
_FIRST_RIGHT = Version("5.23")


class ModelFiles(NamedTuple):
    """Where transformers finds a model and its tokenizer.

    ``name``: a folder or a hub id. ``gguf``: the file in that folder that holds it all; or None.
    ``hub_id``: of which the folder is the cache's, where the hub does not answer; or None.
    """

    name: str
    gguf: str | None
    hub_id: str | None = None

    @property
    def path(self) -> str:
        """What errors call it."""
        return self.name if self.gguf is None else os.path.join(self.name, self.gguf)

    @property
    def options(self) -> dict[str, Any]:
        """For every ``from_pretrained``; code that comes with a model is never run."""
        found: dict[str, Any] = {"trust_remote_code": False}
        return found if self.gguf is None else {**found, "gguf_file": self.gguf}


def find_files(source: str | os.PathLike[str]) -> ModelFiles:
    """What a path or hub id names. A folder with a GGUF file and no other weights names that file.

    Raises:
        UnsupportedModel: there is no such GGUF file, or there are several and none is named; or
            it is a hub id, and neither the hub nor the cache has anything to say of it.
    """
    name = os.path.expanduser(os.fspath(source))
    path = Path(name)
    if name and path.is_dir():
        return ModelFiles(name, _only_gguf(path))
    if not name.endswith(_GGUF):
        cached = cached_only(name) if name and not looks_local(name) else None
        return ModelFiles(name, None) if cached is None else ModelFiles(str(cached), None, name)
    if not path.is_file():
        raise UnsupportedModel(f"model {name!r}: there is no such file")
    return ModelFiles(str(path.parent), path.name)


def looks_local(name: str) -> bool:
    """Whether that is a path by its looks, and no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_packages(files: ModelFiles) -> None:
    """UnsupportedModel: what reads GGUF files is not installed, or too old; says what is needed."""
    if files.gguf is None:
        return
    import transformers  # whose module is another one once some of its parts were imported

    if Version(transformers.__version__) < _FIRST_RIGHT:
        raise UnsupportedModel(
            f"model {files.path!r}: GGUF files need transformers {_FIRST_RIGHT} or later, and this "
            f"is {transformers.__version__}"
        )
    missing = [each for each in _NEEDED if find_spec(each) is None]
    if missing:
        raise UnsupportedModel(
            f"model {files.path!r}: transformers reads GGUF files by packages that are not "
            f"installed: pip install {' '.join(missing)}"
        )


def _only_gguf(folder: Path) -> str | None:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return None
    found = [name for name in names if name.endswith(_GGUF)]
    if len(found) > 1:
        raise UnsupportedModel(
            f"model {str(folder)!r} holds several GGUF files; name one of them: {', '.join(found)}"
        )
    return found[0] if found else None
