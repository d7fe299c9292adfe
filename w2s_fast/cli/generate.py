"""`w2s-fast generate`: one prompt to the terminal, or a JSONL file to a JSONL file."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from w2s_fast.cli.batch import run_batch
from w2s_fast.cli.console import note, note_console, out_console
from w2s_fast.cli.jsonl import Request, answer_record, encode_record, fingerprint
from w2s_fast.cli.models import Decode, decoder, load_engine, made_by, name_models
from w2s_fast.cli.paths import check_input, check_output
from w2s_fast.params import Finished, Method, Proposal, ScoreKind, SearchParams, Selection
from w2s_fast.result import SearchResult

DEFAULT = SearchParams()


def _by_round(text: str, what: str, words: tuple[str, ...] = ()) -> Any:
    """A number, or several with commas between, one a round; ``words`` stand for None."""
    try:
        parts = [part.strip().lower() for part in text.split(",")]
        values = [None if part in words else int(part) for part in parts]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: {what}; or several, as 8,4,2") from None
    return values if len(values) > 1 else values[0]


def _width(text: str) -> int | list[int]:
    found: int | list[int] = _by_round(text, "a number")
    return found


def _chunk_length(text: str) -> int | list[int | None] | None:
    what = "a number of tokens, or none (whole)"
    found: int | list[int | None] | None = _by_round(text, what, ("none", "0"))
    return found


def _option(*names: str, help: str, panel: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=help, rich_help_panel=panel)
    return option


FILES, MODELS, SEARCH, SAMPLING, MACHINE = "Files", "Models", "Search", "Sampling", "Machine"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    input: Annotated[
        Path | None,
        _option("--input", help="JSONL: prompt, optional id, any search parameter", panel=FILES),
    ] = None,
    output: Annotated[
        Path | None, _option("--output", help="JSONL; default: standard output", panel=FILES)
    ] = None,
    resume: Annotated[
        bool, _option("--resume", help="Go on with an interrupted --output.", panel=FILES)
    ] = False,
    retry_errors: Annotated[
        bool,
        _option("--retry-errors", help="With --resume: try failed lines again.", panel=FILES),
    ] = False,
    json: Annotated[
        bool, _option("--json", help="Print a JSON record instead of text.", panel=FILES)
    ] = False,
    base: Annotated[
        str | None, _option("--base", help="Path or hub id of the large model.", panel=MODELS)
    ] = None,
    tuned: Annotated[
        list[str] | None,
        _option("--tuned", help="Small tuned model; repeat for several guides.", panel=MODELS),
    ] = None,
    untuned: Annotated[
        list[str] | None,
        _option("--untuned", help="The model it was tuned from, or none.", panel=MODELS),
    ] = None,
    weight: Annotated[
        list[float] | None, _option("--weight", help="Factor of a guide's score.", panel=MODELS)
    ] = None,
    method: Annotated[
        Method,
        _option(
            "--method",
            help="cbs: chunk-level beam search; bon: best-of-N; beam: beams of the base alone; "
            "fusion: logits of all models",
            panel=SEARCH,
        ),
    ] = DEFAULT.method,
    proposal: Annotated[
        Proposal,
        _option("--proposal", help="What cbs and bon draw from: base, or fused", panel=SEARCH),
    ] = DEFAULT.proposal,
    beta: Annotated[
        list[float] | None,
        _option(
            "--beta",
            help="Factor of the guides' logits in fusion, not given: their weights; "
            "repeat for one a guide",
            panel=SEARCH,
        ),
    ] = None,
    plausibility: Annotated[
        float,
        _option(
            "--plausibility",
            help="Of fusion: least share of the base's likeliest token; 0: off",
            panel=SEARCH,
        ),
    ] = DEFAULT.plausibility,
    beam_width: Annotated[
        str,
        _option(
            "--beam-width", help="W: hypotheses kept each round; 8,4,2: by round", panel=SEARCH
        ),
    ] = str(DEFAULT.beam_width),
    successors: Annotated[
        str, _option("--successors", help="K: candidates of each; N of best-of-N", panel=SEARCH)
    ] = str(DEFAULT.successors),
    chunk_length: Annotated[
        str, _option("--chunk-length", help="L: tokens a round; none or 0: whole", panel=SEARCH)
    ] = str(DEFAULT.chunk_length),
    chunk_stop: Annotated[
        list[str] | None,
        _option(
            "--chunk-stop", help="String that ends a chunk sooner; repeat for several", panel=SEARCH
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        _option("--stop", help="String that ends an answer; repeat for several", panel=SEARCH),
    ] = None,
    include_stop: Annotated[
        bool, _option("--include-stop", help="Print it, too.", panel=SEARCH)
    ] = DEFAULT.include_stop_str_in_output,
    min_new_tokens: Annotated[
        int, _option("--min-new-tokens", help="Tokens before an answer may end", panel=SEARCH)
    ] = DEFAULT.min_new_tokens,
    n: Annotated[int, _option("-n", help="Answers to return, best first", panel=SEARCH)] = 1,
    finished: Annotated[
        Finished,
        _option("--finished", help="Hold a finished hypothesis, or replicate it", panel=SEARCH),
    ] = DEFAULT.finished,
    dedup: Annotated[
        bool, _option("--dedup", help="Keep one of equal candidates.", panel=SEARCH)
    ] = DEFAULT.dedup,
    score: Annotated[
        ScoreKind, _option("--score", help="Sum or mean of token scores", panel=SEARCH)
    ] = DEFAULT.score,
    selection: Annotated[
        Selection,
        _option("--selection", help="Keep the best, or resample by their scores", panel=SEARCH),
    ] = "top",
    tau: Annotated[
        float, _option("--tau", help="Temperature of resampling", panel=SEARCH)
    ] = DEFAULT.tau,
    length_penalty: Annotated[
        float,
        _option("--length-penalty", help="beam: power of the length in scores", panel=SEARCH),
    ] = DEFAULT.length_penalty,
    early_stopping: Annotated[
        Literal["false", "true", "never"],
        _option("--early-stopping", help="beam: as transformers has it", panel=SEARCH),
    ] = "false",
    trace: Annotated[
        bool, _option("--trace", help="Show (or write) the search tree.", panel=SEARCH)
    ] = False,
    max_new_tokens: Annotated[
        int, _option("--max-new-tokens", help="Tokens of an answer at most", panel=SAMPLING)
    ] = DEFAULT.max_new_tokens,
    temperature: Annotated[
        float, _option("--temperature", help="0: greedy", panel=SAMPLING)
    ] = DEFAULT.temperature,
    top_k: Annotated[int, _option("--top-k", help="0: off", panel=SAMPLING)] = DEFAULT.top_k,
    top_p: Annotated[float, _option("--top-p", help="1: off", panel=SAMPLING)] = DEFAULT.top_p,
    min_p: Annotated[float, _option("--min-p", help="0: off", panel=SAMPLING)] = DEFAULT.min_p,
    seed: Annotated[
        int, _option("--seed", help="Same request, same seed, same tokens", panel=SAMPLING)
    ] = DEFAULT.seed,
    device: Annotated[str, _option("--device", help="auto, cpu, cuda", panel=MACHINE)] = "auto",
    dtype: Annotated[
        str, _option("--dtype", help="auto, float32, bfloat16, float16", panel=MACHINE)
    ] = "auto",
    attention: Annotated[
        str, _option("--attention", help="auto, triton, flash, torch", panel=MACHINE)
    ] = "auto",
    cuda_graphs: Annotated[
        bool,
        _option(
            "--cuda-graphs/--no-cuda-graphs", help="Replay small passes, on CUDA", panel=MACHINE
        ),
    ] = True,
    compile: Annotated[
        bool, _option("--compile", help="Run what is replayed through torch.compile", panel=MACHINE)
    ] = False,
    page_size: Annotated[
        int, _option("--page-size", help="Tokens in a page of the KV cache", panel=MACHINE)
    ] = 16,
    max_rows: Annotated[
        int | None,
        _option("--max-rows", help="Candidates in one step; default: by memory", panel=MACHINE),
    ] = None,
    max_pass_tokens: Annotated[
        int | None,
        _option(
            "--max-pass-tokens", help="Prompts' tokens in a pass; default: by memory", panel=MACHINE
        ),
    ] = None,
    kv_cache_tokens: Annotated[
        int | None,
        _option("--kv-cache-tokens", help="Size of the KV cache; default: measured", panel=MACHINE),
    ] = None,
) -> None:
    """Steer a model through one prompt, or through a JSONL file of them.

    With no model named, the bundled demo models answer.

    Exit code: 0 all well, 1 some input lines failed, 2 nothing could be run or written.
    """
    _check_usage(prompt, input, output, resume, retry_errors)
    params = SearchParams(
        method=method,
        proposal=proposal,
        beta=beta[0] if beta and len(beta) == 1 else beta or None,
        plausibility=plausibility,
        beam_width=_width(beam_width),
        successors=_width(successors),
        chunk_length=_chunk_length(chunk_length),
        chunk_stop=chunk_stop or (),
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        include_stop_str_in_output=include_stop,
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
    models = name_models(base, tuned or [], untuned or [], weight or [])
    if params.uses_guides and not models.guides and input is None:
        raise typer.BadParameter("steering needs --tuned and --untuned, or --method sample or beam")
    # Whatever can be refused is refused before models are loaded.
    if input is not None:
        check_input(input)
        if output is not None:
            check_output(output, input, resume)
    load = partial(
        load_engine,
        models,
        device,
        dtype,
        kv_cache_tokens,
        attention=attention,
        cuda_graphs=cuda_graphs,
        compile=compile,
        page_size=page_size,
        max_rows=max_rows,
        max_pass_tokens=max_pass_tokens,
    )
    if prompt is None:
        assert input is not None
        makers = made_by(models, device, dtype)
        failed = run_batch(load, makers, params, input, output, resume, retry_errors)
        raise typer.Exit(1 if failed else 0)
    engine = load()
    start = time.perf_counter()
    result = engine.generate([prompt], params)[0]
    seconds = time.perf_counter() - start
    if json:
        makers = made_by(models, device, dtype)
        print_ = fingerprint(makers, None, prompt, params)
        record = answer_record(Request(0, print_, None, makers, prompt, params), result)
        sys.stdout.buffer.write(encode_record(record))
        sys.stdout.buffer.flush()
        return
    _print_answer(prompt, result, decoder(engine))
    usage = result.usage
    note(
        f"{usage.completion_tokens} tokens in the answer, {usage.sampled_tokens} sampled, "
        f"{usage.scored_tokens} scored by each guide, {seconds:.2f} s"
    )


def _check_usage(
    prompt: str | None, input: Path | None, output: Path | None, resume: bool, retry_errors: bool
) -> None:
    if (prompt is None) == (input is None):
        raise typer.BadParameter("give a PROMPT or an --input file, one of the two")
    if output is not None and input is None:
        raise typer.BadParameter("--output goes with --input")
    if resume and output is None:
        raise typer.BadParameter("--resume goes on with an --output file: name it")
    if retry_errors and not resume:
        raise typer.BadParameter("--retry-errors goes with --resume")
    try:
        (prompt or "").encode("utf-8")
    except UnicodeEncodeError:
        raise typer.BadParameter("the prompt is not UTF-8") from None


def _print_answer(prompt: str, result: SearchResult, decode: Decode) -> None:
    """The answers; in a terminal after their prompt, in a pipe alone."""
    console = out_console()
    for rank, hypothesis in enumerate(result.hypotheses, start=1):
        if len(result.hypotheses) > 1 or note_console().is_terminal:
            value = "" if hypothesis.score is None else f"score {hypothesis.score:+.2f}, "
            note(f"{rank}. {value}{hypothesis.finish_reason}")
        text = hypothesis.text or ""
        if console.is_terminal:
            safe = text.replace("\x1b", "\N{REPLACEMENT CHARACTER}")  # what a terminal would obey
            console.print(Text.assemble((prompt, "dim"), safe), soft_wrap=True)
        else:
            typer.echo(text)
    if result.trace is not None:
        from w2s_fast.demo import search_tree

        tree = search_tree(prompt, result, decode, ascii_only=console.options.ascii_only)
        console.print(tree)
