"""The openai package against a real server: what it sends is understood, what it reads is there."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.support.servers import Running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="ab", seed=5, n=2, logprobs=1)
    assert len(found.choices) == 2 and found.usage is not None
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs and logprobs.top_logprobs
    pieces = client.completions.create(model="tiny", prompt="ab", seed=5, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == found.choices[0].text
    more = client.completions.create(
        model="tiny", prompt="ab", seed=5, extra_body={"beam_width": 3, "chunk_length": 2}
    )
    assert more.choices[0].finish_reason in ("stop", "length")


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    found = client.chat.completions.create(
        model="tiny",
        messages=messages,  # type: ignore[arg-type]
        seed=5,
        logprobs=True,
        top_logprobs=2,
    )
    content = found.choices[0].message.content
    assert content is not None and found.choices[0].logprobs is not None
    pieces = client.chat.completions.create(
        model="tiny",
        messages=messages,  # type: ignore[arg-type]
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    *growing, last = pieces
    assert "".join(p.choices[0].delta.content or "" for p in growing) == content
    assert last.usage is not None and last.usage.completion_tokens > 0


def test_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="gpt-5", prompt="ab")
    with pytest.raises(openai.BadRequestError, match="n is 0"):
        client.completions.create(model="tiny", prompt="ab", n=0)


def test_many_at_a_time_are_answered_as_alone(server: Running, client: openai.OpenAI) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as shared:

            async def one(seed: int) -> str:
                if seed % 2:
                    found = await shared.completions.create(model="tiny", prompt="ab", seed=seed)
                    return found.choices[0].text
                stream = await shared.completions.create(
                    model="tiny", prompt="ab", seed=seed, stream=True
                )
                return "".join([piece.choices[0].text async for piece in stream])

            return await asyncio.gather(*map(one, range(20)))

    together = asyncio.run(ask())
    alone = [
        client.completions.create(model="tiny", prompt="ab", seed=seed).choices[0].text
        for seed in range(20)
    ]
    assert together == alone
