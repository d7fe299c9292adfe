"""How a body asks for a search: by fields of :class:`w2s_fast.SearchParams`, or of others.

Nothing that is asked for is ignored: a field that means something elsewhere, and nothing here, is
refused with the name of what is meant, unless its value asks for nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from w2s_fast.errors import InvalidRequest
from w2s_fast.params import Finished, Method, Proposal, ScoreKind, SearchParams, Selection

# Fields of other servers: values that ask for nothing, and what to write in their place.
_ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "beam_width, with method 'beam'"),
    "num_beam_groups": ((1,), "dedup"),
    "num_return_sequences": ((1,), "n"),
    "diversity_penalty": ((0,), "dedup"),
    "do_sample": ((True,), "temperature 0 for greedy decoding"),
    "max_length": ((), "max_tokens"),
    "max_new_tokens": ((), "max_tokens"),
    "frequency_penalty": ((0,), ""),
    "presence_penalty": ((0,), ""),
    "repetition_penalty": ((1,), ""),
    "no_repeat_ngram_size": ((0,), ""),
    "typical_p": ((1,), "top_p or min_p"),
    "top_a": ((0,), "min_p"),
    "penalty_alpha": ((0,), "method 'fusion' with plausibility, which is contrastive decoding"),
    "guidance_scale": ((1,), "beta, with method 'fusion'"),
    "logit_bias": (({},), "a guide, or method 'fusion'"),
    "suffix": (("",), ""),
    "response_format": (({"type": "text"},), ""),
    "structured_outputs": ((), ""),
    "guided_json": ((), ""),
    "guided_regex": ((), ""),
    "guided_choice": ((), ""),
    "guided_grammar": ((), ""),
    "json_schema": ((), ""),
    "regex": ((), "stop"),
    "ebnf": ((), ""),
    "tools": (([],), ""),
    "tool_choice": (("none", "auto"), ""),
    "functions": (([],), ""),
    "function_call": (("none", "auto"), ""),
    "parallel_tool_calls": ((True, False), ""),
    "reasoning_effort": ((), "chat_template_kwargs"),
    "modalities": ((["text"],), ""),
    "prediction": ((), ""),
    "prompt_logprobs": ((), "echo with logprobs, or /v1/score"),
    "return_logprob": ((False,), "logprobs"),
    "logprob_start_len": ((-1,), "echo with logprobs"),
    "top_logprobs_num": ((0,), "logprobs"),
    "sampling_params": (({},), "its fields beside the prompt"),
    "skip_special_tokens": ((True,), ""),
    "spaces_between_special_tokens": ((True, False), ""),
    "truncate_prompt_tokens": ((), "a shorter prompt"),
    "lora_path": ((), "model"),
    "priority": ((0,), ""),
}
# What clients send along, and what changes no answer.
_HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "verbosity", "request_id"),
)
# Written as null these say something; others are then as if they were not there.
_NULL_SAYS = ("chunk_length", "beta")
_OWN = (
    *("method", "beam_width", "successors", "chunk_length", "chunk_stop", "temperature", "top_k"),
    *("top_p", "min_p", "seed", "stop", "include_stop_str_in_output", "stop_token_ids"),
    *("ignore_eos", "n", "trace", "finished", "dedup", "score", "selection", "tau", "proposal"),
    *("beta", "plausibility", "length_penalty", "early_stopping"),
)


class SearchFields(BaseModel):
    """Fields of a body that say how to search; what is left out is as the server was started."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Method | None = None
    beam_width: int | list[int] | None = None
    successors: int | list[int] | None = None
    chunk_length: int | list[int | None] | None = None
    chunk_stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    trace: bool | None = None
    finished: Finished | None = None
    dedup: bool | None = None
    score: ScoreKind | None = None
    selection: Selection | None = None
    tau: float | None = None
    proposal: Proposal | None = None
    beta: float | list[float] | None = None
    plausibility: float | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    use_beam_search: bool | None = None
    best_of: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_elsewhere(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in _HARMLESS or value is None:
                continue
            elif name not in _ELSEWHERE:
                raise ValueError(f"{name!r:.80} is no field of this body")
            elif value not in _ELSEWHERE[name][0]:
                instead = _ELSEWHERE[name][1]
                hint = f"; allowed: {instead}" if instead else "; it has no counterpart here"
                raise ValueError(f"{name!r} is not understood{hint}")
        return kept

    def params(self, defaults: SearchParams, most_tokens: int) -> SearchParams:
        """What the body asks for, ``max_tokens`` 0 as if it were 1.

        Args:
            defaults: of the server. most_tokens: that a response may have.

        Raises:
            InvalidRequest: names the field.
        """
        given = self.model_fields_set
        own: dict[str, Any] = {
            name: value
            for name in _OWN
            if name in given and ((value := getattr(self, name)) is not None or name in _NULL_SAYS)
        }
        if own.get("top_k") == -1:
            own["top_k"] = 0  # how vLLM writes "all"
        wanted = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        if self.max_completion_tokens not in (None, wanted):
            raise InvalidRequest(
                "max_completion_tokens and max_tokens differ; allowed: one of them"
            )
        if wanted is not None:
            if not 0 <= wanted <= most_tokens:
                raise InvalidRequest(f"max_tokens is {wanted}; allowed: 0 to {most_tokens}")
            own["max_new_tokens"] = max(1, wanted)
        if self.min_tokens is not None:
            own["min_new_tokens"] = self.min_tokens
        own.setdefault("seed", defaults.seed or secrets.randbits(32))
        self._understand(own, defaults)
        return replace(defaults, **own)

    def _understand(self, own: dict[str, Any], defaults: SearchParams) -> None:
        """Beam search as vLLM's users write it, the best of N as OpenAI's, and ``n`` of all."""
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise InvalidRequest(f"best_of is {self.best_of}; allowed: at least n ({self.n or 1})")
        if self.use_beam_search:
            if own.get("method", "beam") != "beam":
                raise InvalidRequest(
                    f"use_beam_search is True beside method {self.method!r}; allowed: one of them"
                )
            own["method"] = "beam"
            own.setdefault("beam_width", self.best_of or self.n or defaults.kept)
        elif (self.best_of or 1) > (self.n or 1):
            if own.get("method", "bon") != "bon" or "successors" in own:
                raise InvalidRequest(
                    "best_of is method 'bon' with that many successors, or the width of "
                    "use_beam_search; allowed: no other method beside it"
                )
            own |= {"method": "bon", "successors": self.best_of}
        method = own.get("method", defaults.method)
        widths = {"cbs": "beam_width", "beam": "beam_width", "bon": "successors"}
        width = widths.get(method)
        if self.n is not None and width is not None and width not in own:
            usual = getattr(defaults, width)
            if isinstance(usual, int) and usual < self.n:
                own[width] = self.n  # as many as are asked for
