"""Options that several commands have: which models, and what they run on."""

from __future__ import annotations

from typing import Annotated

from w2s_fast.cli.options import MACHINE, MODELS, PROMPTS, option

Base = Annotated[
    str | None, option("--base", help="Path or hub id of the large model.", panel=MODELS)
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
