"""Builds csrc/: the page manager (always) and the CUDA page copies (where nvcc is found).

Everything else about the package is in pyproject.toml. Neither part needs torch to build: the
page manager sees no tensor, and the CUDA library takes raw pointers through ctypes.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
# Machine code for those of them that nvcc knows, and PTX of the newest for what comes later.
CUDA_ARCHITECTURES = ("80", "90", "100")


ParallelCompile(default=0).install()  # on all cores


def relative(paths) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (nvcc := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return nvcc
    return shutil.which("nvcc")


class CudaLibrary(Extension):
    """A plain shared library made by nvcc; no Python module, so no PyInit symbol."""


class BuildExt(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if isinstance(self.ext_map.get(fullname), CudaLibrary):
            return str(Path(*fullname.split("."))) + sysconfig.get_config_var("EXT_SUFFIX")
        return super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        if not isinstance(extension, CudaLibrary):
            super().build_extension(extension)
            return
        nvcc = find_nvcc()
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # The CUDA runtime is linked statically, so that no CUDA installation is needed to load it.
        command = [nvcc, "-O3", "-std=c++17", "-shared", "-cudart", "static"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-o", str(target)]
        try:
            known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
            archs = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]
            command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            command += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs[-1:]]
            subprocess.run([*command, *extension.sources], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # The extension is optional: setuptools turns this into a warning.
            raise CompileError(f"{nvcc} failed: {error}") from error


def extensions() -> list[Extension]:
    pages = Pybind11Extension(
        "w2s_fast._pages",
        relative((ROOT / "csrc").glob("*.cpp")),
        depends=relative((ROOT / "csrc").glob("*.h")),
        include_dirs=["csrc"],
        extra_compile_args=["-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
        cxx_std=20,
    )
    sources = relative((ROOT / "csrc").glob("*.cu"))
    if not sources:
        return [pages]
    if find_nvcc() is None:
        print("w2s_fast: no nvcc found, building without csrc/*.cu (torch copies the pages)")
        return [pages]
    return [pages, CudaLibrary("w2s_fast._cuda", sources, optional=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
    packages=[
        "w2s_fast",
        *(f"w2s_fast.{package}" for package in find_packages("w2s_fast")),
        "w2s_fast.kernels",
    ],
    # kernels/ must not be a package of its own: a top-level package called `kernels` breaks
    # `import transformers` wherever the hub's `kernels` is installed.
    package_dir={"w2s_fast.kernels": "kernels"},
)
