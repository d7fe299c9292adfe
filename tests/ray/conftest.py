"""A real Ray, of this machine alone, for all tests of a worker."""

from __future__ import annotations

import os
import secrets
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:
    pytest.skip("Ray is not here: pip install w2s-fast[ray]", allow_module_level=True)

ROOT = Path(__file__).parents[2]

# Before Ray is imported, which reads them, and for what tests start, too: a key of our own and none
# in the user's home, no reports to its makers, and the code of this checkout in every process.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own use of pydantic is not ours to mend
    import ray.data
    import ray.serve

OBJECT_STORE = 100 * 2**20  # bytes


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    # Sockets lie there, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=OBJECT_STORE,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
