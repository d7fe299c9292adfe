"""The server: an engine behind HTTP, as OpenAI's clients ask for text.

Owns what crosses the wire: bodies and answers, streams, errors, limits, metrics and logs, and how
the process starts and stops. What a search is, it does not know.
"""

from w2s_fast.serve.app import build_app
from w2s_fast.serve.live import saved_events
from w2s_fast.serve.page import saved_page
from w2s_fast.serve.run import run_server
from w2s_fast.serve.settings import Limits, ServerSettings
from w2s_fast.serve.weights import check_weights

__all__ = [
    "Limits",
    "ServerSettings",
    "build_app",
    "check_weights",
    "run_server",
    "saved_events",
    "saved_page",
]
