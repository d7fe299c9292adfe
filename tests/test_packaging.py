"""What is installed, and what importing it costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.made_once import made_once

ROOT = Path(__file__).parent.parent
BUILD_TOOLS = {"setuptools": (77,), "wheel": (0,), "pybind11": (2, 13)}  # as in pyproject.toml


def test_the_folder_kernels_is_no_package_of_its_own() -> None:
    # transformers looks for the hub's package `kernels`, and must not find this one.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert all("__version__" not in file.read_text() for file in (ROOT / "kernels").glob("*.py"))


IMPORTS = """
import json, sys, w2s_fast
from w2s_fast import SearchParams, SearchResult, errors
before = "torch" in sys.modules
from w2s_fast import Engine, Guide
after = "torch" in sys.modules
from w2s_fast.kernels import noise
from transformers import AutoModelForCausalLM
names = [Engine.__name__, Guide.__name__, AutoModelForCausalLM.__name__]
print(json.dumps({"torch": [before, after], "names": names, "kernels": noise.__file__}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a process finds that was started in the checkout's root."""
    few_threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, env=few_threads, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


@pytest.mark.thorough
def test_transformers_can_be_imported_from_the_checkouts_root(imported: dict[str, Any]) -> None:
    assert imported["names"][2] == "AutoModelForCausalLM"


def test_kernels_are_imported_from_their_folder(imported: dict[str, Any]) -> None:
    assert Path(imported["kernels"]).resolve() == (ROOT / "kernels" / "noise.py").resolve()


def test_the_public_face_is_there_and_torch_is_imported_only_for_the_engine(
    imported: dict[str, Any],
) -> None:
    assert imported["torch"] == [False, True]
    assert imported["names"][:2] == ["Engine", "Guide"]


@pytest.mark.long
def test_the_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = (
        block.split("```")[0] for block in (ROOT / "README.md").read_text().split("```python\n")[1:]
    )
    # Those that ask a server run in tests/serve.
    first, second = (block for block in blocks if "localhost" not in block)
    exec(f"{first}\nprint('second')\n{second}", {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    assert printed.index("second") == 2
    last = printed[-2:]
    assert last[0].startswith("5 requests, ")
    assert last[1].endswith(" 0 pages in use")


def test_the_makefile_and_the_constraints_name_the_same_torch() -> None:
    pinned = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    (torch,) = [line for line in pinned if line.startswith("torch==")]
    assert f" {torch} " in (ROOT / "Makefile").read_text()


def _can_build() -> bool:
    """Whether a wheel can be built without fetching anything."""
    for name, least in BUILD_TOOLS.items():
        if importlib.util.find_spec(name) is None:
            return False
        version = importlib.metadata.version(name).split(".")[: len(least)]
        if tuple(map(int, version)) < least:
            return False
    return shutil.which("c++") is not None or shutil.which("g++") is not None


# What is tested is what goes into a wheel, which is not run; these sources were compiled when the
# package was installed, and again they would take most of the time. So each is only read, with all
# that it includes, and an empty object stands in its place to be linked.
COMPILER = """#!/bin/sh
case " $* " in *" -c "*) ;; *) exec {real} "$@" ;; esac
{real} "$@" -E || exit
while [ "$1" != -o ]; do shift; done
exec {real} -fPIC -x c++ -c /dev/null -o "$2"
"""


def _build_wheel(folder: Path) -> None:
    """A wheel of a copy of the checkout, without its build leftovers."""
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=leftovers)
    compiler = folder / "c++"
    real = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    compiler.write_text(COMPILER.format(real=real))
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(folder / "source")]
    environment = {**os.environ, "CC": str(compiler), "CXX": str(compiler)}
    built = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel."""
    if not _can_build():
        pytest.skip("setuptools, wheel, pybind11 or a C++ compiler is missing here")
    (wheel,) = made_once(tmp_path_factory, "wheel", _build_wheel).glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.long
@pytest.mark.thorough
def test_a_wheel_holds_all_python_files_and_types(wheel_files: set[str]) -> None:
    for folder, inside in (("w2s_fast", "w2s_fast"), ("kernels", "w2s_fast/kernels")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{file.relative_to(ROOT / folder)}" in wheel_files
    assert {"w2s_fast/py.typed", "w2s_fast/_pages.pyi"} <= wheel_files


@pytest.mark.thorough
def test_a_wheel_holds_the_compiled_page_manager_and_nothing_of_the_tests(
    wheel_files: set[str],
) -> None:
    assert any(name.startswith("w2s_fast/_pages.") and name.endswith(".so") for name in wheel_files)
    assert {name.split("/")[0].split("-")[0] for name in wheel_files} == {"w2s_fast"}
    folders = {name.split("/")[0] for name in wheel_files}
    assert folders == {"w2s_fast", *(name for name in folders if name.endswith(".dist-info"))}


@pytest.mark.thorough
@pytest.mark.parametrize("model", ["base", "tuned", "untuned"])
def test_a_wheel_holds_the_bundled_models(wheel_files: set[str], model: str) -> None:
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f"w2s_fast/demo/{model}/{name}" for name in needed} <= wheel_files


@pytest.mark.thorough
def test_a_wheel_holds_the_server_s_page(wheel_files: set[str]) -> None:
    names = {path.name for path in (ROOT / "w2s_fast" / "serve" / "page").iterdir()}
    assert "page.html" in names
    assert {f"w2s_fast/serve/page/{name}" for name in names} <= wheel_files


@pytest.mark.thorough
def test_a_wheel_holds_the_bundled_adapter_and_the_beginnings(wheel_files: set[str]) -> None:
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {f"w2s_fast/demo/adapter/{name}" for name in names} <= wheel_files
    assert {f"w2s_fast/demo/beginnings_{part}.txt" for part in ("train", "held_out")} <= wheel_files
