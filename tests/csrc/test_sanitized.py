"""The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.drawn import TIMES
from tests.support.made_once import made_once

ROOT = Path(__file__).parents[2]
# Compiles as fast as -O0 and runs as fast as -O1.
FLAGS = ["-std=c++20", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = subprocess.run([compiler, *SANITIZERS, probe, "-o", folder / "probe"])
    if built.returncode or subprocess.run([folder / "probe"]).returncode:
        pytest.skip(f"{compiler} cannot build or run with the sanitizers")
    sources = [
        *(ROOT / "tests/csrc/sanitize").glob("*.cpp"),
        *(file for file in (ROOT / "csrc").glob("*.cpp") if not file.name.startswith("bindings")),
    ]

    def build(folder: Path) -> None:
        # As one unit: most of the time would go into the same headers.
        unit = folder / "all.cpp"
        unit.write_text("".join(f'#include "{source}"\n' for source in sources))
        command = [compiler, *FLAGS, *SANITIZERS, f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, unit, "-o", folder / "random_operations"], check=True)

    return made_once(tmp_path_factory, "random_operations", build) / "random_operations"


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations_are_clean_under_the_sanitizers(program, seed):
    amounts = (str(40_000 * TIMES), str(3_000 * TIMES))
    done = subprocess.run([program, *amounts, str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    happened = {
        what: int(count) for what, count in (line.split(": ") for line in done.stdout.splitlines())
    }
    # Not vacuous: the rare things happened too.
    for rare in ("broken", "started over", "set aside"):
        assert happened.pop(rare) > 50 * TIMES, happened
    assert min(happened.values()) > 250 * TIMES, happened


@pytest.mark.long
def test_the_sanitizers_are_on(program):
    """A program without them would pass everything above."""
    symbols = program.read_bytes()
    assert b"__asan_" in symbols
    assert b"__ubsan_" in symbols
