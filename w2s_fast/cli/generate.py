"""`w2s-fast generate`: one prompt to the terminal, or a JSONL file to a JSONL file."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from w2s_fast.cli import options
from w2s_fast.cli.asking import Asking, TemplateNote
from w2s_fast.cli.base_server import remote_base
from w2s_fast.cli.batch import Batch, run_batch
from w2s_fast.cli.jsonl import Request, answer_record, encode_record, fingerprint
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
from w2s_fast.cli.models import decoder, load_engine, made_by, name_models
from w2s_fast.cli.options import FILES, MACHINE, PROMPTS, SAMPLING, SEARCH, option
from w2s_fast.cli.paths import check_input, check_output
from w2s_fast.cli.ranks import follow, follows, led
from w2s_fast.cli.single import print_answer, search_shown
from w2s_fast.cli.spread import spread
from w2s_fast.cli.usage import chat_tokenizer, check_models, check_usage
from w2s_fast.params import Finished, Method, Proposal, ScoreKind, SearchParams, Selection

DEFAULT = SearchParams()


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    input: Annotated[
        Path | None,
        option(
            "--input",
            help="JSONL (or .parquet): prompt or messages, optional id, any search parameter; "
            "-: standard input",
            panel=FILES,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "--output",
            help="JSONL, or a folder .parquet; default: standard output",
            panel=FILES,
        ),
    ] = None,
    resume: Annotated[
        bool, option("--resume", help="Go on with an interrupted --output.", panel=FILES)
    ] = False,
    retry_errors: Annotated[
        bool,
        option("--retry-errors", help="With --resume: try failed lines again.", panel=FILES),
    ] = False,
    json: Annotated[
        bool, option("--json", help="Print a JSON record instead of text.", panel=FILES)
    ] = False,
    chat: Annotated[
        bool, option("--chat", help="Put texts as a user's message of a chat.", panel=PROMPTS)
    ] = False,
    system: Annotated[
        str | None,
        option("--system", help="System message before it; implies --chat", panel=PROMPTS),
    ] = None,
    ray: Annotated[
        bool, option("--ray", help="Answer the --input on a cluster of Ray.", panel=MACHINE)
    ] = False,
    actors: Annotated[
        int | None,
        option("--actors", help="With --ray: engines, not given: 1", panel=MACHINE),
    ] = None,
    prompt_template: PromptTemplate = None,
    guide_prompt_template: GuidePromptTemplate = None,
    base: Base = None,
    tuned: Tuned = None,
    untuned: Untuned = None,
    weight: Weight = None,
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
    method: Annotated[
        Method,
        option(
            "--method",
            help="cbs: chunk-level beam search; bon: best-of-N; beam: beams of the base alone; "
            "fusion: logits of all models",
            panel=SEARCH,
        ),
    ] = DEFAULT.method,
    proposal: Annotated[
        Proposal,
        option("--proposal", help="What cbs and bon draw from: base, or fused", panel=SEARCH),
    ] = DEFAULT.proposal,
    beta: Annotated[
        list[float] | None,
        option(
            "--beta",
            help="Factor of the guides' logits in fusion, not given: their weights; "
            "repeat for one a guide",
            panel=SEARCH,
        ),
    ] = None,
    plausibility: Annotated[
        float,
        option(
            "--plausibility",
            help="Of fusion: least share of the base's likeliest token; 0: off",
            panel=SEARCH,
        ),
    ] = DEFAULT.plausibility,
    beam_width: Annotated[
        str,
        option("--beam-width", help="W: hypotheses kept each round; 8,4,2: by round", panel=SEARCH),
    ] = str(DEFAULT.beam_width),
    successors: Annotated[
        str, option("--successors", help="K: candidates of each; N of best-of-N", panel=SEARCH)
    ] = str(DEFAULT.successors),
    chunk_length: Annotated[
        str, option("--chunk-length", help="L: tokens a round; none or 0: whole", panel=SEARCH)
    ] = str(DEFAULT.chunk_length),
    chunk_stop: Annotated[
        list[str] | None,
        option(
            "--chunk-stop", help="String that ends a chunk sooner; repeat for several", panel=SEARCH
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        option("--stop", help="String that ends an answer; repeat for several", panel=SEARCH),
    ] = None,
    include_stop: Annotated[
        bool, option("--include-stop", help="Print it, too.", panel=SEARCH)
    ] = DEFAULT.include_stop_str_in_output,
    stop_token_id: Annotated[
        list[int] | None,
        option(
            "--stop-token-id", help="Token that ends an answer; repeat for several", panel=SEARCH
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, option("--ignore-eos", help="Go on behind EOS.", panel=SEARCH)
    ] = DEFAULT.ignore_eos,
    min_new_tokens: Annotated[
        int, option("--min-new-tokens", help="Tokens before an answer may end", panel=SEARCH)
    ] = DEFAULT.min_new_tokens,
    n: Annotated[int, option("-n", help="Answers to return, best first", panel=SEARCH)] = 1,
    finished: Annotated[
        Finished,
        option("--finished", help="Hold a finished hypothesis, or replicate it", panel=SEARCH),
    ] = DEFAULT.finished,
    dedup: Annotated[
        bool, option("--dedup", help="Keep one of equal candidates.", panel=SEARCH)
    ] = DEFAULT.dedup,
    score: Annotated[
        ScoreKind, option("--score", help="Sum or mean of token scores", panel=SEARCH)
    ] = DEFAULT.score,
    selection: Annotated[
        Selection,
        option("--selection", help="Keep the best, or resample by their scores", panel=SEARCH),
    ] = "top",
    tau: Annotated[
        float, option("--tau", help="Temperature of resampling", panel=SEARCH)
    ] = DEFAULT.tau,
    length_penalty: Annotated[
        float,
        option("--length-penalty", help="beam: power of the length in scores", panel=SEARCH),
    ] = DEFAULT.length_penalty,
    early_stopping: Annotated[
        Literal["false", "true", "never"],
        option("--early-stopping", help="beam: as transformers has it", panel=SEARCH),
    ] = "false",
    trace: Annotated[
        bool, option("--trace", help="Show (or write) the search tree.", panel=SEARCH)
    ] = False,
    max_new_tokens: Annotated[
        int, option("--max-new-tokens", help="Tokens of an answer at most", panel=SAMPLING)
    ] = DEFAULT.max_new_tokens,
    temperature: Annotated[
        float, option("--temperature", help="0: greedy", panel=SAMPLING)
    ] = DEFAULT.temperature,
    top_k: Annotated[int, option("--top-k", help="0: off", panel=SAMPLING)] = DEFAULT.top_k,
    top_p: Annotated[float, option("--top-p", help="1: off", panel=SAMPLING)] = DEFAULT.top_p,
    min_p: Annotated[float, option("--min-p", help="0: off", panel=SAMPLING)] = DEFAULT.min_p,
    seed: Annotated[
        int, option("--seed", help="Same request, same seed, same tokens", panel=SAMPLING)
    ] = DEFAULT.seed,
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
    """Steer a model through one prompt, or through a JSONL file of them.

    With no model named, the bundled demo models answer.

    Exit code: 0 all well, 1 some input lines failed, 2 nothing could be run or written.
    """
    check_usage(prompt, input, output, resume, retry_errors, ray, actors)
    one_of_others = not ray and follows(tensor_parallel)
    params = SearchParams(
        method=method,
        proposal=proposal,
        beta=beta[0] if beta and len(beta) == 1 else beta or None,
        plausibility=plausibility,
        beam_width=options.width(beam_width),
        successors=options.width(successors),
        chunk_length=options.chunk_length(chunk_length),
        chunk_stop=chunk_stop or (),
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        include_stop_str_in_output=include_stop,
        stop_token_ids=stop_token_id or (),
        ignore_eos=ignore_eos,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        n=n,
        trace=trace,
        finished=finished,
        dedup=dedup,
        score=score,
        selection=selection,
        tau=tau,
        length_penalty=length_penalty,
        early_stopping="never" if early_stopping == "never" else early_stopping == "true",
    )
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
    # Whatever can be refused is refused before models are loaded.
    if input is None:
        check_models(params, models)
    elif not one_of_others:
        check_input(input)
        if output is not None:
            check_output(output, input, resume)
    asking = Asking(chat or system is not None, system, prompt_template is not None)
    load = partial(
        load_engine,
        models,
        dtype=dtype,
        kv_cache_tokens=kv_cache_tokens,
        tokenizer=chat_tokenizer(models) if asking.chat else None,
        attention=attention,
        cuda_graphs=cuda_graphs,
        compile=compile,
        page_size=page_size,
        max_rows=max_rows,
        max_pass_tokens=max_pass_tokens,
        tensor_parallel=tensor_parallel,
    )
    if one_of_others:
        follow(partial(load, device))
    if prompt is None:
        assert input is not None
        how = partial(
            Batch, input, output, params, asking, resume=resume, retry_errors=retry_errors
        )
        if ray:
            pool = (actors or 1, max_rows, tensor_parallel)
            with spread(models, load, params, device, dtype, *pool) as engines:
                failed = run_batch(engines.load, how(made_by=engines.made_by))
        else:
            makers = made_by(models, device, dtype)
            with ExitStack() as stack:
                own = partial(stack.enter_context, led(tensor_parallel, partial(load, device)))
                failed = run_batch(own, how(made_by=makers))
        raise typer.Exit(1 if failed else 0)
    with led(tensor_parallel, partial(load, device)) as engine:
        asked = asking.prompt(prompt)
        TemplateNote(asking, engine.tokenizer).see(asked)
        before = "" if asking.chat else prompt
        start = time.perf_counter()
        result = search_shown(engine, asked, params, before=before, text=not json)
        seconds = time.perf_counter() - start
    if json:
        makers = made_by(models, device, dtype)
        print_ = fingerprint(makers, None, asked, params)
        record = answer_record(Request(0, print_, None, makers, asked, params), result)
        sys.stdout.buffer.write(encode_record(record))
        sys.stdout.buffer.flush()
        return
    print_answer(before, result, decoder(engine), seconds)
