"""Scheduling: which requests take the next step, so that a round never runs out of pages.

Owns all requests that have come and not ended, the promise of pages for whole rounds, and the one
turn in which steps are taken. Requests are set aside and go on later; nothing is lost. What a step
does is the search's business; what scorers of the caller's say is asked for beside the steps.
"""

from w2s_fast.scheduling.claim import Claim
from w2s_fast.scheduling.judge import Judge
from w2s_fast.scheduling.reading import check_readable, read_given
from w2s_fast.scheduling.rehearsal import rehearse
from w2s_fast.scheduling.runner import Runner
from w2s_fast.scheduling.scheduler import Scheduler
from w2s_fast.scheduling.scoring import Given, check_room, score_given
from w2s_fast.scheduling.works import works_of

__all__ = [
    "Claim",
    "Given",
    "Judge",
    "Runner",
    "Scheduler",
    "check_readable",
    "check_room",
    "read_given",
    "rehearse",
    "score_given",
    "works_of",
]
