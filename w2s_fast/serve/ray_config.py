"""What an application on Ray Serve is started with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from w2s_fast import Engine, Guide, RemoteBase
from w2s_fast.demo import demo_model_paths
from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.models import load_tokenizer
from w2s_fast.params import SearchParams
from w2s_fast.serve.settings import MIB, Limits, ServerSettings
from w2s_fast.serve.weights import check_weights

_ROWS = 256  # of an engine that is not told how many: as many as it takes on any device
_KEY = "W2S_FAST_API_KEY"  # as of `w2s-fast serve`
_NO_MODEL = "none"


class RayConfig(BaseModel):
    """Options of ``w2s-fast serve``, by their names and with their defaults, and replicas.

    ``host`` and ``port`` are not among them: they are Serve's own (``http_options``). Paths are
    those of the machine that a replica runs on, so they lead to the same on all of them.

    Attributes:
        search: fields of :class:`w2s_fast.SearchParams`, of searches whose body does not say.
        num_replicas: engines. Beside it, ``min_replicas`` and ``max_replicas``: as many as there is
            to do.
        target_ongoing_requests: bodies a replica that run or wait, on average, above which there
            are to be more replicas; not given: as many as its rows take at once.
        max_ongoing_requests: bodies that a replica is given at a time, the others wait in front;
            not given: a quarter more, so that rows that become free are taken at the next step.
        num_cpus, num_gpus: of a replica, or of each of its ranks; GPUs not given: none on
            ``device: cpu``, else one.
        tensor_parallel: ranks that hold the base of a replica together, a process each.
        placement_strategy: whether these have to be on one machine, or are so if there is room.
        front_replicas: processes that take requests in. front_cpus: of each.
        max_surge_percent: of an upgrade: replicas more than there are to be, meanwhile, in percent;
            0: an old one leaves before a new one begins, for GPUs are seldom spare.
        health_check_seconds: between two looks whether a replica is well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    api_key: tuple[SecretStr, ...] = ()
    log_text: bool = False
    max_queue: int = 512
    max_tokens: int = 4096
    max_candidates: int = 256
    max_prompts: int = 128
    max_body: int = 4 * MIB
    time_limit: float = 600.0
    drain: float = 60.0
    base: str | None = None
    tuned: tuple[str, ...] = ()
    untuned: tuple[str, ...] = ()
    weight: tuple[float, ...] = ()
    allow_pickles: bool = False
    tokenizer: str | None = None
    base_url: str | None = None
    base_model: str | None = None
    api_key_env: str | None = None
    base_route: Literal["auto", "completions", "chat"] = "auto"
    extra_body: dict[str, Any] = Field(default_factory=dict)
    max_concurrency: int = 16
    max_requests: int | None = None
    max_total_tokens: int | None = None
    price_per_million: tuple[float, float] | None = None
    prompt_template: str | None = None
    guide_prompt_template: tuple[str, ...] = ()
    guide_device: str | None = None
    chat_template: Path | None = None
    search: dict[str, Any] = Field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    cuda_graphs: bool = True
    compile: bool = False
    page_size: int = 16
    max_rows: int | None = Field(None, ge=1)
    max_pass_tokens: int | None = None
    kv_cache_tokens: int | None = None

    num_replicas: int = Field(1, ge=1)
    min_replicas: int | None = Field(None, ge=0)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    max_ongoing_requests: int | None = Field(None, ge=1)
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float | None = Field(None, ge=0)
    tensor_parallel: int = Field(1, ge=1)
    placement_strategy: Literal["PACK", "STRICT_PACK"] = "PACK"
    front_replicas: int = Field(2, ge=1)
    front_cpus: float = Field(0.5, ge=0)
    max_surge_percent: int = Field(0, ge=0, le=100)
    health_check_seconds: float = Field(10.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _as_options(cls, given: Any) -> Any:
        """Names may be spelled as options are: ``max-queue``."""
        if not isinstance(given, dict):
            return given
        return {str(name).replace("-", "_"): value for name, value in given.items()}

    @field_validator(
        "api_key", "tuned", "untuned", "weight", "guide_prompt_template", mode="before"
    )
    @classmethod
    def _one_is_a_list_of_it(cls, given: Any) -> Any:
        return given if isinstance(given, (list, tuple)) else () if given is None else (given,)

    @field_validator("extra_body", mode="before")
    @classmethod
    def _json(cls, given: Any) -> Any:
        return json.loads(given) if isinstance(given, str) else given

    @field_validator("price_per_million", mode="before")
    @classmethod
    def _two_numbers(cls, given: Any) -> Any:
        return given.split(",") if isinstance(given, str) else given

    @model_validator(mode="after")
    def _together(self) -> RayConfig:
        """Whatever can be refused is refused where it was written, before replicas start."""
        if len(self.tuned) != len(self.untuned):
            raise ValueError(f"each tuned needs its untuned ({_NO_MODEL}: it has none)")
        if self.base is None and self.base_url is None and self.tuned:
            raise ValueError("tuned and untuned steer a base: name it")
        if self.base is not None and self.base_url is not None:
            raise ValueError("base and base_url: there is one base")
        if self.base_url is None and (self.base_model or self.api_key_env):
            raise ValueError("base_model and api_key_env go with base_url")
        guides = len(self.tuned) or int(self.base is None)
        if self.weight and len(self.weight) != guides:
            raise ValueError(f"{len(self.weight)} weights for {guides} guides")
        if self.guide_prompt_template and len(self.guide_prompt_template) not in (1, guides):
            raise ValueError(f"{len(self.guide_prompt_template)} templates for {guides} guides")
        if (self.min_replicas is None) != (self.max_replicas is None):
            raise ValueError("min_replicas and max_replicas go together")
        if self.tensor_parallel > 1:
            if self.base_url is not None or self.compile:
                raise ValueError("tensor_parallel goes neither with base_url nor with compile")
            if not self.num_cpus and not self.gpus:
                raise ValueError("num_cpus and num_gpus are 0: a rank needs one of them")
        try:
            defaults = self.defaults
        except TypeError as error:
            raise ValueError(f"search: {error}") from error
        if defaults.uses_guides and not guides:
            raise ValueError("steering needs tuned and untuned, or search: {method: sample}")
        return self

    @property
    def defaults(self) -> SearchParams:
        """Of searches whose body does not say."""
        given = dict(self.search)
        if self.base is not None and not self.tuned:
            given.setdefault("method", "sample")
        return SearchParams(**given)

    @property
    def settings(self) -> ServerSettings:
        """Of the server that each replica is. Keys may stand in the environment instead."""
        keys = self.api_key
        if not keys and os.environ.get(_KEY):
            keys = (SecretStr(os.environ[_KEY]),)
        limits = Limits(
            body_bytes=self.max_body,
            prompts=self.max_prompts,
            tokens=self.max_tokens,
            candidates=self.max_candidates,
            queue=self.max_queue,
            seconds=self.time_limit,
            drain_seconds=self.drain,
        )
        named = "bundled" if self.base is None else self.base.rstrip("/").rsplit("/", 1)[-1]
        if self.base_url is not None:
            named = self.base_model or "remote"
        return ServerSettings(
            name=self.name or named, limits=limits, api_keys=keys, log_text=self.log_text
        )

    @property
    def places(self) -> int:
        """Usual searches that an engine's rows take at once."""
        return max(1, (self.max_rows or _ROWS) // self.defaults.rows)

    @property
    def most_ongoing(self) -> int:
        """Bodies that a replica is given at a time."""
        return self.max_ongoing_requests or self.places + max(1, self.places // 4)

    @property
    def gpus(self) -> float:
        """Of a replica, or of each of its ranks."""
        if self.num_gpus is not None:
            return self.num_gpus
        return 0.0 if self.device == "cpu" else 1.0

    def load(self) -> Engine:
        """The engine of a replica, where it is to run; of several ranks on each.

        Raises:
            UnsupportedModel: a model cannot be loaded or served.
            RemoteFailure: the server of a remote base cannot be used.
            InvalidRequest: weights are pickles, or an argument is not allowed.
        """
        base, guides = self._models()
        if not self.allow_pickles:
            named = {"base": base} if isinstance(base, str) else {}
            for g, guide in enumerate(guides):
                named |= {f"tuned {g}": str(guide.tuned)}
                if guide.untuned is not None:
                    named |= {f"untuned {g}": str(guide.untuned)}
            check_weights(named)
        tokenizer = None
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer)
            if tokenizer is None:
                raise UnsupportedModel(f"tokenizer {self.tokenizer}: there is none")
        engine = Engine(
            base,
            guides or None,
            tokenizer=tokenizer,
            prompt_template=self.prompt_template,
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            cuda_graphs=self.cuda_graphs,
            compile=self.compile,
            page_size=self.page_size,
            max_rows=self.max_rows,
            max_pass_tokens=self.max_pass_tokens,
            kv_cache_tokens=self.kv_cache_tokens,
            tensor_parallel=self.tensor_parallel,
        )
        if self.chat_template is not None:
            if engine.tokenizer is None:
                raise InvalidRequest("chat_template needs a tokenizer; the base has none")
            engine.tokenizer.chat_template = self.chat_template.read_text(encoding="utf-8")
        engine.warm_up()
        return engine

    def _models(self) -> tuple[str | RemoteBase, list[Guide]]:
        base: str | RemoteBase | None = self.base
        tuned, untuned = self.tuned, self.untuned
        if base is None:
            bundled = demo_model_paths()
            base = str(bundled.base) if self.base_url is None else self._remote(self.base_url)
            if not tuned:
                tuned, untuned = (str(bundled.tuned),), (str(bundled.untuned),)
        weights = self.weight or (1.0,) * len(tuned)
        templates: tuple[str | None, ...] = self.guide_prompt_template or (None,)
        if len(templates) == 1:
            templates *= len(tuned)
        return base, [
            Guide(
                one,
                None if other == _NO_MODEL else other,
                weight,
                template,
                device=self.guide_device,
            )
            for one, other, weight, template in zip(tuned, untuned, weights, templates)
        ]

    def _remote(self, url: str) -> RemoteBase:
        """Its key stands in the environment of the machine that a replica runs on."""
        key = None
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise InvalidRequest(f"api_key_env: there is no key in {self.api_key_env}")
        return RemoteBase(
            url,
            self.base_model,
            api_key=key,
            route=self.base_route,
            max_concurrency=self.max_concurrency,
            max_requests=self.max_requests,
            max_total_tokens=self.max_total_tokens,
            price_per_million=self.price_per_million,
            extra_body=self.extra_body,
        )
