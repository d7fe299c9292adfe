"""Whether the hub answers, asked once and briefly.

Its own clients try again and again for most of a minute, for each of the files that may be there.
"""

from __future__ import annotations

import time
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache

from w2s_fast.errors import UnsupportedModel

_SECONDS = 5.0  # for an answer, of any kind
_HOLDS = 30.0  # seconds that what was found stays true
_FIRST_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")

_found: tuple[float, str, str | None] | None = None  # when, of which hub, and what was found


def cached_only(name: str) -> Path | None:
    """The folder of a hub id in the cache, where the hub cannot be asked; None: it can.

    Raises:
        UnsupportedModel: it is not in the cache either; says what can be done.
    """
    why = _unreachable()
    if why is None:
        return None
    for file in _FIRST_FILES:
        if isinstance(found := try_to_load_from_cache(name, file), str):
            return Path(found).parent
    raise UnsupportedModel(
        f"model {name!r} is neither a folder nor in the cache ({constants.HF_HUB_CACHE}), and "
        f"{why}; give the path of a folder, or run `hf download {name}` where there is a network "
        "and bring the folder that it names, or its whole cache (HF_HOME says where that lies)"
    )


def _unreachable() -> str | None:
    """Why the hub cannot be asked; None: it answers."""
    global _found
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    hub = constants.ENDPOINT
    if _found is None or _found[1] != hub or time.monotonic() - _found[0] > _HOLDS:
        try:
            get_session().head(hub, timeout=_SECONDS)
            why = None
        except Exception as error:  # whatever its client raises: there was no answer
            why = f"the hub ({hub}) does not answer: {error}"
        _found = time.monotonic(), hub, why
    return _found[2]
