"""Options that several commands have: which models, and what they run on."""

from __future__ import annotations

from typing import Annotated, Literal

from w2s_fast.cli.options import MACHINE, MODELS, PROMPTS, REMOTE, option

Base = Annotated[
    str | None, option("--base", help="Path or hub id of the large model.", panel=MODELS)
]
BaseUrl = Annotated[
    str | None,
    option(
        "--base-url",
        help="The large model is behind this OpenAI-compatible server, as http://host:8000/v1.",
        panel=REMOTE,
    ),
]
BaseModel = Annotated[
    str | None,
    option("--base-model", help="Its name there; not given: the only one", panel=REMOTE),
]
ApiKeyEnv = Annotated[
    str | None,
    option("--api-key-env", help="Environment variable with the server's key", panel=REMOTE),
]
BaseRoute = Annotated[
    Literal["auto", "completions", "chat"],
    option("--base-route", help="By which its texts go on; auto: as it can", panel=REMOTE),
]
ExtraBody = Annotated[
    str | None,
    option("--extra-body", help="JSON: further fields of every request to it", panel=REMOTE),
]
MaxConcurrency = Annotated[
    int, option("--max-concurrency", help="Requests to it at a time", panel=REMOTE)
]
MaxRequests = Annotated[
    int | None, option("--max-requests", help="To it, of one search", panel=REMOTE)
]
MaxTotalTokens = Annotated[
    int | None,
    option("--max-total-tokens", help="Read and sampled by it, of one search", panel=REMOTE),
]
PricePerMillion = Annotated[
    str | None,
    option("--price-per-million", help="IN,OUT: of its tokens, read and sampled", panel=REMOTE),
]
Tuned = Annotated[
    list[str] | None,
    option("--tuned", help="Small tuned model; repeat for several guides.", panel=MODELS),
]
Untuned = Annotated[
    list[str] | None,
    option("--untuned", help="The model it was tuned from, or none.", panel=MODELS),
]
Weight = Annotated[
    list[float] | None, option("--weight", help="Factor of a guide's score.", panel=MODELS)
]
Tokenizer = Annotated[
    str | None,
    option(
        "--tokenizer",
        help="Path or hub id of the base's, where it does not lie with it",
        panel=MODELS,
    ),
]
PromptTemplate = Annotated[
    str | None,
    option(
        "--prompt-template",
        help="Text around every plain prompt of the base, {prompt} in it",
        panel=PROMPTS,
    ),
]
GuidePromptTemplate = Annotated[
    list[str] | None,
    option(
        "--guide-prompt-template",
        help="The same for the guides, not given: none; repeat for one a guide",
        panel=PROMPTS,
    ),
]
Device = Annotated[str, option("--device", help="auto, cpu, cuda", panel=MACHINE)]
GuideDevice = Annotated[
    str | None, option("--guide-device", help="The guides', if it is another", panel=MACHINE)
]
TensorParallel = Annotated[
    int,
    option(
        "--tensor-parallel", help="Processes that hold the base together, a GPU each", panel=MACHINE
    ),
]
Dtype = Annotated[str, option("--dtype", help="auto, float32, bfloat16, float16", panel=MACHINE)]
Attention = Annotated[str, option("--attention", help="auto, triton, flash, torch", panel=MACHINE)]
CudaGraphs = Annotated[
    bool,
    option("--cuda-graphs/--no-cuda-graphs", help="Replay small passes, on CUDA", panel=MACHINE),
]
Compile = Annotated[
    bool, option("--compile", help="Run what is replayed through torch.compile", panel=MACHINE)
]
PageSize = Annotated[
    int, option("--page-size", help="Tokens in a page of the KV cache", panel=MACHINE)
]
MaxRows = Annotated[
    int | None,
    option("--max-rows", help="Candidates in one step; default: by memory", panel=MACHINE),
]
MaxPassTokens = Annotated[
    int | None,
    option(
        "--max-pass-tokens", help="Prompts' tokens in a pass; default: by memory", panel=MACHINE
    ),
]
KvCacheTokens = Annotated[
    int | None,
    option("--kv-cache-tokens", help="Size of the KV cache; default: measured", panel=MACHINE),
]
