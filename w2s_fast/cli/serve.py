"""`w2s-fast serve`: an OpenAI-compatible server over one engine."""

from __future__ import annotations

import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from w2s_fast.cli.base_server import remote_base
from w2s_fast.cli.console import note
from w2s_fast.cli.model_options import (
    ApiKeyEnv,
    Attention,
    Base,
    BaseModel,
    BaseRoute,
    BaseUrl,
    Compile,
    CudaGraphs,
    Device,
    Dtype,
    ExtraBody,
    GuideDevice,
    GuidePromptTemplate,
    KvCacheTokens,
    MaxConcurrency,
    MaxPassTokens,
    MaxRequests,
    MaxRows,
    MaxTotalTokens,
    PageSize,
    PricePerMillion,
    PromptTemplate,
    TensorParallel,
    Tokenizer,
    Tuned,
    Untuned,
    Weight,
)
from w2s_fast.cli.models import Models, load_engine, name_models
from w2s_fast.cli.options import MODELS, PROMPTS, SEARCH, option
from w2s_fast.cli.ranks import follow, follows, others
from w2s_fast.cli.usage import check_models
from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams

if TYPE_CHECKING:
    from w2s_fast import Engine

SERVER, LIMITS = "Server", "Limits"


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """The file's values become the options' defaults, before which the command line comes."""
    if path is None:
        return None
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path} is no mapping of options to values")
    names = {parameter.name for parameter in context.command.params} - {"config"}
    values = {str(key).replace("-", "_"): value for key, value in found.items()}
    if unknown := sorted(set(values) - names):
        raise typer.BadParameter(
            f"{path}: unknown: {', '.join(unknown)}; allowed: {', '.join(sorted(names))}"
        )
    # One value of an option that may be repeated is a list of it: click would take its letters.
    repeated = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    for key in repeated & set(values) - {"search"}:
        if not isinstance(values[key], list):
            values[key] = [values[key]]
    search = values.get("search")
    if isinstance(search, dict):
        values["search"] = [f"{name}={_as_yaml(value)}" for name, value in search.items()]
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _as_yaml(value: Any) -> str:
    import json

    return json.dumps(value)  # which is YAML, too


def search_defaults(given: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as fields of SearchParams. typer.BadParameter."""
    import yaml

    allowed = {field.name for field in fields(SearchParams)}
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or name not in allowed:
            raise typer.BadParameter(
                f"--search {one!r}: allowed: NAME=VALUE, NAME one of {', '.join(sorted(allowed))}"
            )
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise typer.BadParameter(f"--search {one!r}: its value cannot be read") from None
    return found


def serve(
    config: Annotated[
        Path | None,
        option(
            "--config",
            help="YAML: these options' names and values; search: a mapping",
            panel=SERVER,
            exists=True,
            dir_okay=False,
            is_eager=True,
            callback=_read_config,
        ),
    ] = None,
    host: Annotated[str, option("--host", help="Address to listen at", panel=SERVER)] = "127.0.0.1",
    port: Annotated[int, option("--port", help="0: any that is free", panel=SERVER)] = 8000,
    name: Annotated[
        str | None,
        option("--name", help="The model's in answers; not given: the base's", panel=SERVER),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        option(
            "--api-key",
            help="A client must send one of these; repeat for several",
            panel=SERVER,
            envvar="W2S_FAST_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    log_text: Annotated[
        bool, option("--log-text", help="Write prompts and answers to the log.", panel=SERVER)
    ] = False,
    max_queue: Annotated[
        int, option("--max-queue", help="Requests at a time; more get 429", panel=LIMITS)
    ] = 512,
    max_tokens: Annotated[
        int, option("--max-tokens", help="Of an answer that a body may ask for", panel=LIMITS)
    ] = 4096,
    max_candidates: Annotated[
        int, option("--max-candidates", help="Of a round: W * K, or N", panel=LIMITS)
    ] = 256,
    max_prompts: Annotated[int, option("--max-prompts", help="In one body", panel=LIMITS)] = 128,
    max_body: Annotated[int, option("--max-body", help="Bytes", panel=LIMITS)] = 4 * 2**20,
    time_limit: Annotated[
        float, option("--time-limit", help="Seconds of a request", panel=LIMITS)
    ] = 600.0,
    drain: Annotated[
        float,
        option("--drain", help="Seconds for what runs when told to stop", panel=LIMITS),
    ] = 60.0,
    base: Base = None,
    tuned: Tuned = None,
    untuned: Untuned = None,
    weight: Weight = None,
    allow_pickles: Annotated[
        bool,
        option(
            "--allow-pickles",
            help="Read weights that are not in safetensors or GGUF, too.",
            panel=MODELS,
        ),
    ] = False,
    tokenizer: Tokenizer = None,
    base_url: BaseUrl = None,
    base_model: BaseModel = None,
    api_key_env: ApiKeyEnv = None,
    base_route: BaseRoute = "auto",
    extra_body: ExtraBody = None,
    max_concurrency: MaxConcurrency = 16,
    max_requests: MaxRequests = None,
    max_total_tokens: MaxTotalTokens = None,
    price_per_million: PricePerMillion = None,
    prompt_template: PromptTemplate = None,
    guide_prompt_template: GuidePromptTemplate = None,
    chat_template: Annotated[
        Path | None,
        option(
            "--chat-template",
            help="Jinja file in the place of the base's own",
            panel=PROMPTS,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    search: Annotated[
        list[str] | None,
        option(
            "--search",
            help="NAME=VALUE: of a search whose body does not say; repeat for several",
            panel=SEARCH,
        ),
    ] = None,
    device: Device = "auto",
    guide_device: GuideDevice = None,
    tensor_parallel: TensorParallel = 1,
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    cuda_graphs: CudaGraphs = True,
    compile: Compile = False,
    page_size: PageSize = 16,
    max_rows: MaxRows = None,
    max_pass_tokens: MaxPassTokens = None,
    kv_cache_tokens: KvCacheTokens = None,
) -> None:
    """Serve a steered model as OpenAI's clients ask for one; a page to look at lies at /.

    With no model named, the bundled demo models answer. SIGTERM: what runs is finished first.
    """
    try:
        from pydantic import SecretStr

        from w2s_fast.serve import (
            Limits,
            ServerSettings,
            build_app,
            check_weights,
            run_server,
        )
    except ModuleNotFoundError as error:
        note(f"error: {error.name} is missing; pip install w2s-fast[serve]", style="red")
        raise typer.Exit(2) from None
    models = name_models(
        base,
        tuned or [],
        untuned or [],
        weight or [],
        tokenizer=tokenizer,
        prompt_template=prompt_template,
        guide_templates=guide_prompt_template or [],
        guide_device=guide_device,
        remote=remote_base(
            base_url,
            base_model,
            api_key_env,
            route=base_route,
            max_concurrency=max_concurrency,
            max_requests=max_requests,
            max_total_tokens=max_total_tokens,
            price_per_million=price_per_million,
            extra_body=extra_body,
        ),
    )
    given = search_defaults(search or [])
    if not models.guides:
        given.setdefault("method", "sample")
    defaults = SearchParams(**given)
    check_models(defaults, models)
    if not allow_pickles:
        check_weights(models.named())
    limits = Limits(
        body_bytes=max_body,
        prompts=max_prompts,
        tokens=max_tokens,
        candidates=max_candidates,
        queue=max_queue,
        seconds=time_limit,
        drain_seconds=drain,
    )
    settings = ServerSettings(
        name=name or _name_of(models),
        limits=limits,
        api_keys=tuple(map(SecretStr, filter(None, api_key or ()))),
        log_text=log_text,
    )

    def load(quiet: bool = False) -> Engine:
        engine = load_engine(
            models,
            device,
            dtype,
            kv_cache_tokens,
            quiet,
            attention=attention,
            cuda_graphs=cuda_graphs,
            compile=compile,
            page_size=page_size,
            max_rows=max_rows,
            max_pass_tokens=max_pass_tokens,
            tensor_parallel=tensor_parallel,
        )
        if chat_template is not None:
            if engine.tokenizer is None:
                raise InvalidRequest("--chat-template needs a tokenizer; the base has none")
            engine.tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        engine.warm_up()
        return engine

    if follows(tensor_parallel):
        follow(load)
    with others(tensor_parallel) as ranks:
        engine = load()
        # What cannot serve any more ends, and whoever looks after it starts it anew.
        ranks.ready(at_loss=lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_server(build_app(engine, settings, defaults), settings, host, port)
        if ranks.lost:
            note("error: one of the ranks has ended", style="red")
            raise typer.Exit(1)


def _name_of(models: Models) -> str:
    if models.remote is not None:
        return models.remote.model or "remote"
    return "bundled" if models.bundled else models.base.rstrip("/").rsplit("/", 1)[-1]
