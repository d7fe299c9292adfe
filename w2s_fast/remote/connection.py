"""From a base as a caller names it to where its samples come from."""

from __future__ import annotations

from w2s_fast.errors import UnsupportedModel
from w2s_fast.remote.base import RemoteBase
from w2s_fast.remote.replay import Replay
from w2s_fast.remote.source import Source


def connect(base: RemoteBase) -> Source:
    """Find out what the server can do, or get its recording ready.

    Raises:
        RemoteFailure: there is no such server, it refuses the key, or it has no route or model.
        UnsupportedModel: the openai package is not installed.
    """
    if base.recorded is not None:
        return Replay(base.recorded)
    try:
        from w2s_fast.remote.client import Client
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise UnsupportedModel(
            "a remote base needs the openai package: pip install 'w2s-fast[remote]'"
        ) from None
    return Client(base)
