"""Torch's threads: how many it takes, and that they soon sleep where there is nothing to do.

Those of OpenMP, which torch has, wait for their next operation in a loop. Where a core is shared,
or a control group allows only a part of one, that takes the time of the thread that is waited for:
`python -m bench.threads` has the factor.
"""

from __future__ import annotations

import os
import sys

# Whoever has set one of them has decided how threads wait.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# How often a thread of libgomp, which torch's wheels for Linux have, looks for work before it
# sleeps. Asleep at once, threads that have cores to themselves lose more by waking up than they
# save: `python -m bench.threads --also OMP_WAIT_POLICY=PASSIVE` has both.
_LOOKS = "6000"
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def let_threads_sleep() -> None:
    """To be called before torch is imported, which is when OpenMP looks at its environment."""
    if "torch" not in sys.modules and chosen_waiting() is None:
        if sys.platform == "linux":
            os.environ["GOMP_SPINCOUNT"] = _LOOKS
        else:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def chosen_waiting() -> str | None:
    """What the environment says about how threads wait; None: nothing."""
    found = [f"{name}={os.environ[name]}" for name in _WAITING if name in os.environ]
    return ", ".join(found) or None


def take_usable_cores() -> None:
    """Torch takes a thread for every core that it may run on; of a quota it knows nothing."""
    import torch

    from w2s_fast.models import usable_cores

    # Not where it is so already: with that call the command was slower (`python -m bench.threads`).
    if chosen_count() is None and usable_cores().usable < torch.get_num_threads():
        torch.set_num_threads(usable_cores().usable)


def chosen_count() -> str | None:
    """What the environment says about how many threads there are; None: nothing."""
    found = [f"{name}={os.environ[name]}" for name in _COUNTS if name in os.environ]
    return ", ".join(found) or None
