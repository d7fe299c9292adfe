"""In how many cohorts the requests of an engine take their steps, by the rows that they have.

With one, the device waits while the host closes its rounds and opens the next ones. With two, it
runs those of one cohort meanwhile; but each cohort reads the models' weights for itself.
"""

from __future__ import annotations

# From so many rows on: how many cohorts. Estimated, not measured; `python -m bench.cohorts` does
# that on a GPU. What can be hidden is the host's part of a round, 3 to 5 ms for 1,024 rows. It
# costs nothing if either half alone has so many rows that a pass computes for longer than it reads
# weights: by the numbers of an H100, in bfloat16, some 300.
_COHORTS = {0: 1, 768: 2}


def cohorts_of(rows: int) -> int:
    """How many cohorts so many rows are run in, where steps are launched ahead."""
    return next(count for least, count in reversed(_COHORTS.items()) if rows >= least)


def one_cohort(rows: int) -> int:
    """All in one, however many there are."""
    return 1
