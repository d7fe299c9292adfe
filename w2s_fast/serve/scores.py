"""``/v1/score``: what the guides, or one model, say of given texts."""

from __future__ import annotations

import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from w2s_fast.engine import Engine
from w2s_fast.serve.refusals import Refusal
from w2s_fast.serve.service import Service

# Of SGLang's route of this name, which gives the probabilities of single tokens.
_LABELS = ("label_token_ids", "apply_softmax", "item_first")


class ScoreBody(BaseModel):
    """``items`` are scored behind ``query``.

    Attributes:
        of: ``"guides"``: their weighted log-ratios; or ``"base"``, ``"tuned"``, ``"untuned"`` (of
            several guides ``"tuned 0"`` and so on): one model's log-probs.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    query: str | list[int]
    items: list[str] | list[list[int]] = Field(min_length=1)
    of: str = "guides"

    @model_validator(mode="before")
    @classmethod
    def _no_labels(cls, given: Any) -> Any:
        for name in _LABELS:
            if isinstance(given, dict) and given.get(name):
                raise ValueError(
                    f"{name!r} asks for probabilities of label tokens; this route scores whole "
                    "items: allowed: query, items, of"
                )
        if isinstance(given, dict):
            return {name: value for name, value in given.items() if name not in _LABELS}
        return given


async def scores(service: Service, body: ScoreBody) -> dict[str, Any]:
    """Sums, and values token by token where all models of a score read the same tokens."""
    service.check_model(body.model)
    if len(body.items) > service.settings.limits.prompts:
        raise Refusal(
            400,
            f"{len(body.items)} items in one body; allowed: {service.settings.limits.prompts}",
            param="items",
        )
    with service.gate.enter(1):
        sums, values, length = await service.beside(lambda: _scored(service.engine.engine, body))
    tokens = sum(map(len, values or ()))
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "scoring",
        "created": int(time.time()),
        "model": service.settings.name,
        "scores": sums,
        "token_scores": values,
        "usage": {
            "prompt_tokens": length * len(body.items) + tokens,
            "completion_tokens": 0,
            "total_tokens": length * len(body.items) + tokens,
        },
    }


def _scored(engine: Engine, body: ScoreBody) -> tuple[list[float], list[list[float]] | None, int]:
    """Sums, values token by token or None where the guides read other tokens, and the tokens of
    the query."""
    queries, items = [body.query] * len(body.items), body.items
    length = 0 if engine.server else len(engine.encode(body.query))  # nobody knows here
    if body.of == "guides" and not engine.scores_by_token:
        return engine.score(queries, items), None, length
    model = None if body.of == "guides" else body.of
    values = engine.token_scores(queries, items, model=model)
    return [sum(own) for own in values], values, length
