"""Engine: prompts in, results out, as a list, one by one, as a stream, or behind asyncio.

Owns what a caller holds: the models served together, the way from prompts to requests and from
requests to results, and the pieces of a growing answer. It decides nothing about the search.
"""

from w2s_fast.engine.async_engine import AsyncEngine
from w2s_fast.engine.engine import Engine
from w2s_fast.engine.stream import StreamPiece

__all__ = ["AsyncEngine", "Engine", "StreamPiece"]
