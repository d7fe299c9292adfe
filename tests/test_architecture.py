"""ARCHITECTURE.md tells the truth: it lists every file, and imports go up its list only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Listed with the file that they belong to.
PARTS = {"attention_blocks": "gathered_attention", "dense_attention": "gathered_attention"}


def floors() -> dict[str, int]:
    """The number of each file's line in the list of floors."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("**Floors.**")[1]
    lines = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = {name: i for i, line in enumerate(lines) for name in re.findall(r"`([^`]+)`", line)}
    return names | {part: names[whole] for part, whole in PARTS.items()}


def imported(path: Path) -> Iterator[str]:
    """Files of this package that one imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("w2s_fast."):
            yield str(node.module).split(".")[1]


def test_every_file_is_listed_and_imports_only_what_stands_above_it() -> None:
    floor = floors()
    files = [path for path in (ROOT / "w2s_fast").glob("*.py") if path.stem != "__init__"]
    assert len(files) > 40
    for path in files:
        assert path.stem in floor, f"{path.name} is not in ARCHITECTURE.md"
        for name in imported(path):
            if name in floor:
                assert floor[name] <= floor[path.stem], f"{path.stem} imports {name} from below"
