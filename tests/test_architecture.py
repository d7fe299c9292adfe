"""ARCHITECTURE.md tells the truth: which rooms there are, what stands in them, who imports whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
PACKAGE = ROOT / "w2s_fast"
# Files of the package itself; all other rooms are folders.
FLAT = {
    "ops": ("ops",),
    "words": ("params", "generation", "scorer", "widths", "result", "stats", "errors"),
}


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


@cache
def picture() -> dict[str, set[str]]:
    """Each room, from the top floor down, and the rooms that it imports from."""
    block = section("The rooms").split("```")[1]
    found: dict[str, set[str]] = {}
    for line in block.splitlines():
        if match := re.match(r"\s*│ (\w+)\s+─▶(.*)│", line):
            found[match[1]] = set(match[2].split())
    return found


@cache
def listed() -> dict[str, list[str]]:
    """The files of each room, from the top down."""
    rows = [line.split("|") for line in section("The files").splitlines() if line[:3] == "| `"]
    return {row[1].strip(" `"): re.findall(r"`(\w+)`", row[2]) for row in rows}


def files_of(room: str) -> dict[str, Path]:
    if room == "kernels":
        folder = ROOT / "kernels"
    elif room in FLAT:
        return {name: PACKAGE / f"{name}.py" for name in FLAT[room]}
    else:
        folder = PACKAGE / room
    return {path.stem: path for path in folder.glob("*.py") if path.stem != "__init__"}


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports, wherever in it, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] == "w2s_fast":
                yield tuple(name.split(".")[1:])


# Public names that the package itself hands on.
ENGINE, WORDS = ("Engine", "AsyncEngine", "StreamPiece"), ("SearchParams", "SearchResult")
HANDED_ON = {
    "Guide": "search",
    "Chat": "text",
    "RemoteBase": "remote",
    **dict.fromkeys(ENGINE, "engine"),
    **dict.fromkeys(WORDS, "words"),
}


def room_of(module: tuple[str, ...]) -> str | None:
    """The room that a module stands in; None for what is compiled, and for the package itself."""
    if not module or module[0].startswith("_"):
        return None
    flat = {name: room for room, names in FLAT.items() for name in names}
    return HANDED_ON.get(module[0]) or flat.get(module[0], module[0])


def test_the_page_is_short() -> None:
    assert len(PAGE.splitlines()) <= 130


def test_every_room_and_every_file_is_listed_and_nothing_else() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert set(picture()) == set(listed()) == folders | {"kernels", *FLAT}
    for room, names in listed().items():
        assert sorted(names) == sorted(files_of(room)), room
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"ops", *FLAT["words"], "__init__"}


def test_the_picture_shows_the_imports() -> None:
    floors = list(picture())
    for room, shown in picture().items():
        paths = [*files_of(room).values(), *(PACKAGE / room).glob("__init__.py")]
        found = {room_of(module) for path in paths for module in imported(path)} - {None, room}
        assert found == shown, f"{room} imports from {found}"
        for other in shown:
            assert floors.index(other) > floors.index(room), f"{room} imports up, from {other}"


@pytest.mark.parametrize("room", listed())
def test_inside_a_room_files_import_from_those_listed_behind_them(room: str) -> None:
    order = listed()[room]
    for name, path in files_of(room).items():
        for module in imported(path):
            if room_of(module) == room and module[0] not in HANDED_ON:
                other = module[0] if room in FLAT else module[1] if len(module) > 1 else ""
                assert other in order, f"{name} imports from its own room's face"
                assert order.index(other) > order.index(name), f"{name} imports {other}, above it"


def test_nothing_outside_a_room_imports_past_its_face() -> None:
    """Kernels have no face: each file of theirs is one operator."""
    everywhere = [*PACKAGE.rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    assert len(everywhere) > 80
    for path in everywhere:
        own = path.parent.name if path.parent.parent == PACKAGE else ""
        for module in imported(path):
            room = room_of(module)
            if room in (None, "kernels", own, *FLAT) or module[0] in HANDED_ON:
                continue
            face = ast.parse((PACKAGE / str(room) / "__init__.py").read_text())
            handed_on = ast.literal_eval(
                next(
                    node.value
                    for node in ast.walk(face)
                    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                )
            )
            assert len(module) == 2 and module[1] in handed_on, f"{path}: {'.'.join(module)}"


def test_each_room_says_in_one_paragraph_what_it_owns() -> None:
    for room in picture():
        if room not in ("kernels", *FLAT):
            text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
            assert text is not None, room
            first, *rest = text.split("\n\n")
            assert len(first.splitlines()) == 1 and len(rest) == 1, room


def identifiers(path: Path) -> Iterator[str]:
    """Names that a file itself makes or uses; not those of errors, nor what strings say."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_rooms_do_without_the_words_that_are_not_theirs() -> None:
    rows = [line.split("|") for line in section("The words").splitlines() if line[:3] == "| *"]
    assert len(rows) >= 10
    for row in rows:
        word, rooms = row[1].strip(" *"), re.findall(r"`(\w+)`", row[3])
        assert set(rooms) <= set(picture()), word
        for room in rooms:
            for path in files_of(room).values():
                for name in identifiers(path):
                    parts = re.findall(r"[a-z]+|[A-Z][a-z]+", name)
                    parts = [part.lower().removesuffix("s") for part in parts]
                    if name != "InvalidRequest":
                        assert word not in parts, f"{room}/{path.name} says {name}"


def test_the_way_of_a_request_leads_through_what_there_is() -> None:
    """Every name stands where the page says, or in some file of the package or of csrc."""
    steps = section("The way of a request")
    defined = {name for room in (*picture(), "_pages") for name in names_in(room)}
    said = re.findall(r"`([\w.]+)`(?: \(([\w/]+)\))?", steps)
    assert len(said) > 20
    for name, place in said:
        assert name in defined, f"{name} is no more"
        if place.startswith("csrc/"):
            declared = (ROOT / place).with_suffix(".h").read_text()
            assert re.search(rf"\b{name}\(", declared), f"{name} is not in {place}"
        elif place:
            room, file = place.split("/")
            assert name in definitions(files_of(room)[file]), f"{name} is not in {place}"


def names_in(room: str) -> Iterator[str]:
    files = {"_pages": PACKAGE / "_pages.pyi"} if room == "_pages" else files_of(room)
    for path in files.values():
        yield from definitions(path)


def definitions(path: Path) -> set[str]:
    """Its functions and classes, and ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{own.name}" for own in node.body if hasattr(own, "name")}
    return found
