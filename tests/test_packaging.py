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

import pytest

ROOT = Path(__file__).parent.parent
BUILD_TOOLS = {"setuptools": (77,), "wheel": (0,), "pybind11": (2, 13)}  # as in pyproject.toml


def python(script: str) -> str:
    """What a script prints when it is run from the checkout's root."""
    command = [sys.executable, "-c", script]
    few_threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # the models here are too small for more
    answer = subprocess.run(
        command, cwd=ROOT, env=few_threads, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_the_folder_kernels_is_no_package_of_its_own() -> None:
    # transformers looks for the hub's package `kernels`, and must not find this one.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert all("__version__" not in file.read_text() for file in (ROOT / "kernels").glob("*.py"))


def test_transformers_can_be_imported_from_the_checkouts_root() -> None:
    assert python("from transformers import AutoModelForCausalLM as M; print(M.__name__)")


def test_kernels_are_imported_from_their_folder() -> None:
    file = python("from w2s_fast.kernels import noise; print(noise.__file__)")
    assert Path(file).resolve() == (ROOT / "kernels" / "noise.py").resolve()


def test_the_public_face_is_there_and_torch_is_imported_only_for_the_engine() -> None:
    script = (
        "import json, sys, w2s_fast\n"
        "from w2s_fast import SearchParams, SearchResult, errors\n"
        "before = 'torch' in sys.modules\n"
        "from w2s_fast import Engine, Guide\n"
        "print(json.dumps([before, 'torch' in sys.modules, Engine.__name__, Guide.__name__]))"
    )
    assert json.loads(python(script)) == [False, True, "Engine", "Guide"]


def test_the_examples_of_the_readme_run() -> None:
    first, second = (
        block.split("```")[0] for block in (ROOT / "README.md").read_text().split("```python\n")[1:]
    )
    printed = python(f"{first}\nprint('second')\n{second}").splitlines()
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


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that was built from a copy of the checkout, without its build leftovers."""
    if not _can_build():
        pytest.skip("setuptools, wheel, pybind11 or a C++ compiler is missing here")
    folder = tmp_path_factory.mktemp("wheel")
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=leftovers)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(folder / "source")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_holds_all_python_files_and_types(wheel_files: set[str]) -> None:
    for folder, inside in (("w2s_fast", "w2s_fast"), ("kernels", "w2s_fast/kernels")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{file.relative_to(ROOT / folder)}" in wheel_files
    assert {"w2s_fast/py.typed", "w2s_fast/_pages.pyi"} <= wheel_files


def test_a_wheel_holds_the_compiled_page_manager_and_nothing_of_the_tests(
    wheel_files: set[str],
) -> None:
    assert any(name.startswith("w2s_fast/_pages.") and name.endswith(".so") for name in wheel_files)
    assert {name.split("/")[0].split("-")[0] for name in wheel_files} == {"w2s_fast"}
    folders = {name.split("/")[0] for name in wheel_files}
    assert folders == {"w2s_fast", *(name for name in folders if name.endswith(".dist-info"))}


@pytest.mark.parametrize("model", ["base", "tuned", "untuned"])
def test_a_wheel_holds_the_bundled_models(wheel_files: set[str], model: str) -> None:
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f"w2s_fast/demo/{model}/{name}" for name in needed} <= wheel_files
