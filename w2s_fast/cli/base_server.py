"""A base that is a server's, from a command's options."""

from __future__ import annotations

import json
import os
from typing import Any

import typer

from w2s_fast import RemoteBase


def remote_base(
    url: str | None,
    model: str | None,
    key_env: str | None,
    *,
    price_per_million: str | None,
    extra_body: str | None,
    **options: Any,
) -> RemoteBase | None:
    """A base that is a server's; None: the options name none.

    Raises:
        typer.BadParameter: options of a server that is not named, or a variable without a key.
        InvalidRequest: a value that is not allowed.
    """
    if url is None:
        given = {"base-model": model, "api-key-env": key_env, "extra-body": extra_body}
        given |= {"price-per-million": price_per_million, "max-requests": options["max_requests"]}
        given |= {"max-total-tokens": options["max_total_tokens"]}
        if alone := [f"--{name}" for name, value in given.items() if value is not None]:
            raise typer.BadParameter(f"without --base-url there is no use for {', '.join(alone)}")
        return None
    key = None if key_env is None else os.environ.get(key_env, "").strip()
    if key == "":
        raise typer.BadParameter(f"--api-key-env: there is no key in {key_env}")
    try:
        fields = {} if extra_body is None else json.loads(extra_body)
    except ValueError as error:
        raise typer.BadParameter(f"--extra-body is no JSON: {error}") from None
    return RemoteBase(
        url,
        model,
        api_key=key,
        price_per_million=_prices(price_per_million),
        extra_body=fields,
        **options,
    )


def _prices(text: str | None) -> tuple[float, float] | None:
    """``IN,OUT`` as two numbers."""
    if text is None:
        return None
    try:
        read, sampled = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: two numbers, as 0.5,1.5") from None
    return read, sampled
