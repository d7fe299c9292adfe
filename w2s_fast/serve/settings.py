"""What a server is started with, besides its engine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr

MIB = 2**20


class Limits(BaseModel):
    """What a client may ask for; more is refused before any of it runs.

    Attributes:
        body_bytes: of a request. prompts: in one body. tokens: of a response. candidates: of a
            round, W * K, or N of a method that draws N.
        queue: requests, a prompt each, that run or wait at a time; further ones are sent away with
            429 and the seconds after which to try again.
        seconds: from the arrival of a body to its answer's end.
        drain_seconds: for what runs when the server is told to stop.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int = Field(default=4 * MIB, ge=1024)
    prompts: int = Field(default=128, ge=1)
    tokens: int = Field(default=4096, ge=1)
    candidates: int = Field(default=256, ge=1)
    queue: int = Field(default=512, ge=1)
    seconds: float = Field(default=600.0, gt=0)
    drain_seconds: float = Field(default=60.0, ge=0)


class ServerSettings(BaseModel):
    """How to serve.

    Attributes:
        name: what the base is called in answers, and what a body's ``model`` must be.
        api_keys: one of them must come with a request (``Authorization: Bearer ...``); none: nobody
            is asked.
        log_text: write prompts and answers to the log, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    limits: Limits = Limits()
    api_keys: tuple[SecretStr, ...] = ()
    log_text: bool = False
