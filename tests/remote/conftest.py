"""Servers whose bases are asked from outside, and engines over them."""

from __future__ import annotations

from collections.abc import Iterator

import openai._base_client
import pytest

from tests.support.fault_proxy import Proxy, fault_proxy
from tests.support.foreign_guides import make
from tests.support.scripted_server import Script, scripted
from tests.support.servers import Running, running


@pytest.fixture(scope="session")
def own_server() -> Iterator[Running]:
    """This project's own, over a base whose tokens are parts of characters."""
    with running(make("bytes-gpt2", ()), name="own") as found:
        yield found


@pytest.fixture(scope="session")
def own_url(own_server: Running) -> str:
    return f"{own_server.url}/v1"


@pytest.fixture(scope="session")
def proxy(own_url: str) -> Iterator[Proxy]:
    """In front of it."""
    with fault_proxy(own_url) as found:
        yield found


@pytest.fixture(scope="module")
def words() -> Iterator[Script]:
    """A scripted one that no test changes."""
    with scripted() as found:
        yield found


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what failed is tried again: shorter than the client has them."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
