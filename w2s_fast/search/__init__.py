"""Search: rounds of many requests at once: expand, score, select, fork.

Owns requests with the beams of their searches (csrc/beams.h), which slots these hold in the base
and in the guides, and what the guides say of new tokens. One step brings all given requests
further; which requests these are, and whether their pages exist, is decided above.
"""

from w2s_fast._pages import Beam
from w2s_fast.search.choice import OpenChoice
from w2s_fast.search.foreign_guide import ForeignGuide, ForeignGuides, ForeignPrompt
from w2s_fast.search.guide import Guide, PagedGuide, roles_of
from w2s_fast.search.remote_search import RemoteSearch
from w2s_fast.search.request import Ends, Request
from w2s_fast.search.score_graphs import ScoreGraphs
from w2s_fast.search.search import InFlight, Search

__all__ = [
    "Beam",
    "Ends",
    "ForeignGuide",
    "ForeignGuides",
    "ForeignPrompt",
    "Guide",
    "InFlight",
    "OpenChoice",
    "PagedGuide",
    "RemoteSearch",
    "Request",
    "ScoreGraphs",
    "Search",
    "roles_of",
]
