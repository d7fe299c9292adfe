"""Remote: a base that is somebody else's server. Only its samples are needed.

Owns what is said to an OpenAI-compatible server and what it answers: the routes that it has, one
pool of connections, tries that are made again, what a search may cost, recordings that answer in a
server's place, and how texts are held without their tokens. It knows nothing of guides, and does
not decide which samples are kept.
"""

from w2s_fast.remote.account import Account, Budget
from w2s_fast.remote.base import RemoteBase
from w2s_fast.remote.connection import connect
from w2s_fast.remote.drawing import Ask, Drawing, Given
from w2s_fast.remote.prompt import RemotePrompt
from w2s_fast.remote.source import Source
from w2s_fast.remote.utf8 import EOS, Utf8Breaks, Utf8Stops, Utf8Texts, to_bytes, to_text

__all__ = [
    "EOS",
    "Account",
    "Ask",
    "Budget",
    "Drawing",
    "Given",
    "RemoteBase",
    "RemotePrompt",
    "Source",
    "Utf8Breaks",
    "Utf8Stops",
    "Utf8Texts",
    "connect",
    "to_bytes",
    "to_text",
]
