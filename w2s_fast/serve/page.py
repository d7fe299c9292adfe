"""The page at /: one document, which shows a search live, or saved traces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "page"


@cache
def _document() -> str:
    def read(name: str) -> str:
        return (_FOLDER / name).read_text(encoding="utf-8")

    script = read("viewer.js") + read("ask.js")
    return (
        read("page.html").replace("/* STYLE */", read("style.css")).replace("/* SCRIPT */", script)
    )


def live_page() -> str:
    """The page of a server: a form, and what it asks for."""
    return _document()


def saved_page(title: str, searches: Sequence[Mapping[str, Any]]) -> str:
    """A page that needs no server.

    Args:
        title: said at the top. searches: each with its own ``title`` and its ``events``, as
            :mod:`.live` tells them.
    """
    data = json.dumps({"title": title, "searches": searches})
    # Within a script element only "</" could end it, and "<!--" begin something else.
    data = data.replace("<", "\\u003c")
    return _document().replace('id="data">null<', f'id="data">{data}<')
