"""A server over tiny models that write bytes, for the tests that harm nothing."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.support.probed import probed_once
from tests.support.servers import Running, running
from tests.support.tiny_models import byte_tokenizer, tiny_model
from w2s_fast import Engine, Guide, SearchParams

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
DEFAULTS = SearchParams(beam_width=2, successors=2, chunk_length=4, max_new_tokens=12)


def make_engine(**options: object) -> Engine:
    """A base and a guide over bytes, of one layer, with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    base, tuned, untuned = (
        tiny_model(family, seed=i, vocab_size=258, layers=1, eos=(257,), bos=256)
        for i, family in enumerate(("llama", "gpt2", "gpt2"))
    )
    options = {"kv_cache_tokens": 4096, "device": "cpu", "tokenizer": tokenizer, **options}
    with probed_once():
        return Engine(base, Guide(tuned, untuned), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running(make_engine(), DEFAULTS) as found:
        yield found


@pytest.fixture
def http(server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client
