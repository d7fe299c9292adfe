"""Kernels compile for every GPU they are meant for: within registers, with the right instructions.

A new kernel is one more ``Case`` in ``CASES``; which kernels it launches and how comes from its
launcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'w2s-fast[test]'")

from bench.aot import SHARED_LIMIT, SMS, Compilation, compilations
from w2s_fast.kernels import (
    choose_beta,
    fuse_logits,
    linear_logprob,
    paged_attention,
    rms_norm,
    rotate,
    sample_tokens_triton,
    score_select,
    select_beams,
    token_logprob,
    write_kv,
)
from w2s_fast.kernels.library import BACKEND

pytestmark = pytest.mark.skipif(
    BACKEND != "auto", reason=f"W2S_FAST_BACKEND={BACKEND}: kernels are not compiled"
)

ARCHITECTURES = [80, 90, 100]
DTYPES = [torch.bfloat16, torch.float16]
# To compile everything takes minutes: `make test` leaves out what an H100 in bfloat16 does not run,
# and `make aot` compiles all of it.
EVERY_GPU = pytest.mark.every_gpu
EACH_ARCHITECTURE = [
    pytest.param(arch, marks=() if arch == 90 else EVERY_GPU) for arch in ARCHITECTURES
]
EACH_DTYPE = [
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16", marks=EVERY_GPU),
]
# (V, D) of gpt2, an 8B and a 70B.
MODELS = {"gpt2": (50257, 768), "8b": (128256, 4096), "70b": (128256, 8192)}
# One thread's share where every thread of a multiprocessor has as many: 65,536 in all.
REGISTERS = 65536
# (H, Hkv, D) of gpt2, an 8B, and a gemma with a head size of 256.
HEADS = {"gpt2": (12, 12, 64), "8b": (32, 8, 128), "gemma": (8, 4, 256)}
# Head sizes that are no power of two: of an MHA and a GQA model.
ODD_HEADS = {"d80": (32, 32, 80), "d96": (32, 8, 96)}


@dataclass(frozen=True)
class Case:
    """What a launcher asks for on meta tensors, and what has to come out.

    Attributes:
        launch: given the dtype, calls the launcher.
        registers: the most a thread of each kernel may take; names every kernel launched.
        instructions: by architecture, what has to be in the PTX of the first kernel.
    """

    name: str
    launch: Callable[[torch.dtype], object]
    registers: dict[str, int]
    instructions: dict[int, str]


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def token_logprob_case(
    model: str, rows: int, softcap: float | None, kernels: dict[str, int]
) -> Case:
    vocabulary, _ = MODELS[model]

    def launch(dtype: torch.dtype) -> None:
        logits = meta(rows, vocabulary, dtype=dtype)
        token_logprob._triton(logits, meta(rows), None, 1.0, softcap)

    # Rows of an odd vocabulary begin anywhere: no vectors there.
    vectors = {} if vocabulary % 16 else {80: "ld.global.v4", 90: "ld.global.v4"}
    name = f"token_logprob-{model}-{rows}-{softcap}"
    return Case(name, launch, kernels, vectors)


def linear_logprob_case(
    model: str, rows: int, registers: int, bias: bool = False, softcap: float | None = None
) -> Case:
    vocabulary, width = MODELS[model]

    def launch(dtype: torch.dtype) -> None:
        linear_logprob._triton(
            meta(rows, width, dtype=dtype), meta(vocabulary, width, dtype=dtype), meta(rows),
            meta(vocabulary, dtype=dtype) if bias else None, softcap, 1.0, None,
        )  # fmt: skip

    return Case(
        f"linear_logprob-{model}-{rows}-{bias}-{softcap}",
        launch,
        {"_split_vocabulary": registers, "_merge_splits": 64},
        {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"},
    )


def select_beams_case(requests: int, candidates: int, registers: int) -> Case:
    count, length, double = requests * candidates, 5, torch.float64

    def launch(dtype: torch.dtype) -> None:  # log-probs are float32 whatever the models are
        logprobs, flags = meta(2, count * length, dtype=torch.float32), meta(requests).bool()
        select_beams._triton(
            logprobs, logprobs, meta(2, dtype=double), meta(count * length), meta(count + 1),
            meta(count, dtype=double), meta(count), meta(count, dtype=torch.int32), meta(count),
            meta(requests + 1), meta(requests), flags, flags, candidates, 4,
        )  # fmt: skip

    return Case(f"select_beams-{requests}x{candidates}", launch, {"one_round": registers}, {})


def score_select_case(
    requests: int, candidates: int, registers: int, splits: int = 393, length: int = 5
) -> Case:
    """Two guides; their models' heads have as many splits, and one."""
    count, double, single = requests * candidates, torch.float64, torch.float32
    tokens = count * length

    def launch(dtype: torch.dtype) -> None:
        flags = meta(requests).bool()
        partials = [meta(tokens, s, dtype=single) for s in (splits, splits, splits, 1)]
        score_select._triton(
            meta(tokens), partials, partials, [meta(tokens, dtype=single)] * 4,
            meta(2, dtype=double), meta(tokens, dtype=single), meta(count + 1),
            meta(count, dtype=double), meta(count), meta(count, dtype=torch.int32), meta(count),
            meta(requests + 1), meta(2 * requests), meta(requests + 1), meta(requests), flags,
            flags, candidates, 4,
        )  # fmt: skip

    kernels = {"add_guide": 64, "choose_round": registers}
    return Case(f"score_select-{requests}x{candidates}-{splits}", launch, kernels, {})


# 64 registers are eight programs of 128 threads on a multiprocessor, 96 are five, 128 are four; 168
# are one of 256 threads, and so are 255: two warps for each of its schedulers.
def sample_tokens_case(
    vocabulary: int,
    kernels: dict[str, int],
    pitch: int | None = None,
    rows: int = 128,
    first: int = 0,
) -> Case:
    """``pitch``: from row to row. ``first``: how many rows of their settings' buffers stand before
    these."""

    def column(dtype: torch.dtype = torch.int64) -> Tensor:
        return meta(first + rows, dtype=dtype)[first:]

    def launch(dtype: torch.dtype) -> None:
        share = column(torch.float64)
        sample_tokens_triton.launch(
            meta(rows, pitch or vocabulary, dtype=dtype)[:, :vocabulary],
            column(torch.float32), column(), share, share, column(), column(), column(),
        )  # fmt: skip

    vectors = {} if (pitch or vocabulary) % 16 else {80: "ld.global.v4", 90: "ld.global.v4"}
    return Case(f"sample_tokens-{vocabulary}-{pitch}", launch, kernels, vectors)


def fusion_case(vocabulary: int, kernels: dict[str, int], rows: int = 64) -> Case:
    def launch(dtype: torch.dtype) -> None:
        base, tuned, untuned = (meta(*n, rows, vocabulary, dtype=dtype) for n in ((), (2,), (2,)))
        fuse_logits._triton(base, tuned, untuned, meta(2, rows, dtype=torch.float32))
        choose_beta._triton(base, tuned, untuned)

    return Case(f"fusion-{vocabulary}", launch, kernels, {})


def write_kv_case(model: str, registers: int) -> Case:
    _, heads, dim = HEADS[model]

    def launch(dtype: torch.dtype) -> None:
        k, pages = meta(80, heads, dim, dtype=dtype), meta(2, 64, 16, heads, dim, dtype=dtype)
        write_kv._triton(k, k, pages, meta(80))

    vectors = dict.fromkeys(ARCHITECTURES, "st.global.v4")
    return Case(f"write_kv-{model}", launch, {"_scatter": registers}, vectors)


def rms_norm_case(rows: int, width: int, registers: int) -> Case:
    def launch(dtype: torch.dtype) -> None:
        for offset in (False, True):
            rms_norm._triton(meta(rows, width, dtype=dtype), meta(width, dtype=dtype), 1e-5, offset)

    vectors = dict.fromkeys(ARCHITECTURES, "ld.global.v4")
    return Case(f"rms_norm-{rows}x{width}", launch, {"_normalise": registers}, vectors)


def rotate_case(model: str, registers: int) -> Case:
    heads, kv_heads, dim = HEADS[model]

    def launch(dtype: torch.dtype) -> None:
        q, k = (meta(1, 16, n, dim, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads))
        cos = meta(1, 16, dim, dtype=dtype)
        rotate._triton(q, k, cos, cos)

    vectors = dict.fromkeys(ARCHITECTURES, "st.global.v4")
    return Case(f"rotate-{model}", launch, {"_turn": registers}, vectors)


def paged_attention_case(
    model: str,
    rows: int,
    max_q: int,
    max_k: int,
    kernels: dict[str, int],
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    siblings: int = 0,
    own: int = 40,
    ragged: bool = False,
) -> Case:
    """``siblings``: the rows of a segment, each with so many ``own`` keys at most; 0: nothing is
    shared. ``ragged``: so are the tables."""
    heads, kv_heads, dim = {**HEADS, **ODD_HEADS}[model]
    tokens = siblings * max_q

    def launch(dtype: torch.dtype) -> None:
        i32 = torch.int32
        paged_attention._triton(
            meta(rows * max_q, heads, dim, dtype=dtype),
            meta(2, 4096, 16, kv_heads, dim, dtype=dtype),
            meta(*[max_k + rows] if ragged else [rows, -(-max_k // 16)], dtype=i32),
            meta(rows, dtype=i32), meta(rows + 1, dtype=i32), 0.125, window, softcap,
            meta(heads, dtype=dtype) if sinks else None, max_q, max_k,
            *(meta(n, dtype=i32) if siblings else None for n in (rows, rows, rows * max_q)),
            meta(24, 6, dtype=i32) if siblings else None, tokens, 9, own if siblings else max_k,
            meta(rows, dtype=i32) if ragged else None,
        )  # fmt: skip

    # From 64 queries times heads on, a product is one of a whole warp group.
    # Shared tiles may have so many in four warps up to D = 64; with groups of heads, up to 128.
    group = heads // kv_heads
    shares_wide = tokens * group > 32 and dim <= (64 if group == 1 else 128)
    wide = max_q * group > 32 or shares_wide
    products = {
        80: "mma.sync",
        90: "wgmma.mma_async" if wide else "mma.sync",
        100: "tcgen05.mma" if wide else "mma.sync",
    }
    options = f"{window}-{softcap}-{sinks}-{siblings}-{own}-{ragged}"
    name = f"paged_attention-{model}-{rows}x{max_q}-{max_k}-{options}"
    return Case(name, launch, kernels, products)


SAMPLING = {"summarise": 64, "block_weights": 88, "draw": 128, "search": 192}
CUT = {"attend": 255, "finish": 64}
FEW = {"attend": 255, "finish": 144}
FUSION = {"fuse": 96, "grid_sums": 120, "choose": 96}

CASES = [
    token_logprob_case("gpt2", 16, None, {"_split_rows": 64, "_merge_parts": 64}),
    token_logprob_case("gpt2", 2048, None, {"_split_rows": 64}),
    token_logprob_case("8b", 16, None, {"_split_rows": 80, "_merge_parts": 64}),
    token_logprob_case("8b", 2048, 30.0, {"_split_rows": 64}),
    token_logprob_case("gpt2", 16, 30.0, {"_split_rows": 64, "_merge_parts": 64}),
    linear_logprob_case("gpt2", 1, 96),
    linear_logprob_case("8b", 16, 96),
    linear_logprob_case("70b", 32, 128),
    linear_logprob_case("70b", 64, 168),
    linear_logprob_case("gpt2", 1024, 255),
    linear_logprob_case("8b", 80, 255, bias=True, softcap=30.0),
    select_beams_case(64, 16, 64),
    select_beams_case(8, 64, 96),
    select_beams_case(1, 256, 64),
    select_beams_case(1, 512, 64),
    select_beams_case(1, 1024, 64),
    score_select_case(64, 16, 64),
    score_select_case(8, 64, 96, splits=1002),
    score_select_case(1, 256, 64),
    score_select_case(1, 512, 64),
    score_select_case(1, 1024, 64, splits=1),
    *(sample_tokens_case(v, SAMPLING) for v in (900, 16384, 50257, 128256, 151936, 200019)),
    sample_tokens_case(50257, SAMPLING, pitch=50304),  # of a padded head
    fusion_case(50257, FUSION),
    fusion_case(128256, FUSION),
    write_kv_case("gpt2", 64),
    write_kv_case("8b", 64),
    write_kv_case("gemma", 64),
    rms_norm_case(16, 4096, 64),
    rms_norm_case(5120, 1600, 64),
    rms_norm_case(16 * 32, 128, 64),
    rms_norm_case(16, 16384, 64),
    rotate_case("gpt2", 128),
    rotate_case("8b", 128),
    rotate_case("gemma", 128),
    # Decoding, whole and cut; chunks of 5, 16 and 30; a prompt; all options. Limits of 168 and 240
    # are those of as many programs, three and two, as shared memory has room for.
    paged_attention_case("gpt2", 16, 1, 1024, {"attend": 96, "finish": 64}),
    paged_attention_case("gpt2", 16, 30, 256, {"attend": 128}),
    paged_attention_case("gpt2", 4, 512, 256, {"attend": 168}),
    paged_attention_case("8b", 16, 1, 256, {"attend": 168}),
    paged_attention_case("8b", 16, 1, 4096, {"attend": 168, "finish": 64}),
    paged_attention_case("8b", 16, 5, 4096, {"attend": 192, "finish": 64}),
    paged_attention_case("8b", 16, 16, 4096, {"attend": 255, "finish": 64}),
    paged_attention_case("8b", 4, 512, 256, {"attend": 192}),
    paged_attention_case("8b", 16, 1, 4096, CUT, window=1024, softcap=30.0, sinks=True),
    paged_attention_case("8b", 4, 512, 4096, CUT, window=1024, softcap=30.0, sinks=True),
    paged_attention_case("gemma", 16, 1, 4096, {"attend": 168, "finish": 64}),
    paged_attention_case("gemma", 16, 16, 4096, {"attend": 255, "finish": 64}),
    paged_attention_case("gemma", 4, 512, 4096, CUT, window=1024, softcap=50.0),
    # Four hypotheses of four candidates: decoding, and a chunk of 5.
    *(
        paged_attention_case(
            model, 16, max_q, 4200, {"attend": most, "finish": 144}, siblings=16, own=own
        )
        for own in (40, 5)  # with tails of their own, and without
        for model, max_q, most in (
            ("gpt2", 1, 96),
            ("8b", 5, 240),
            ("d80", 5, 240),
            ("d96", 1, 240),
            ("gemma", 5, 240),
        )
    ),
    paged_attention_case(
        "8b", 16, 1, 4200, FEW, window=1024, softcap=30.0, sinks=True, siblings=16
    ),
    # Ragged tables, as plans have them, take no more.
    paged_attention_case("gpt2", 16, 1, 1024, {"attend": 96, "finish": 64}, ragged=True),
    paged_attention_case("8b", 4, 512, 256, {"attend": 192}, ragged=True),
    *(
        paged_attention_case(
            model, 16, max_q, 4200, {"attend": most, "finish": 144}, siblings=16, own=5, ragged=True
        )
        for model, max_q, most in (("gpt2", 1, 96), ("8b", 5, 240))
    ),
]


def check(case: Case, arch: int, compiled: list[Compilation]) -> None:
    assert {c.name for c in compiled} == set(case.registers)
    for c in compiled:
        assert c.spilled == 0, str(c)
        assert c.registers <= case.registers[c.name], str(c)
        assert c.registers * c.num_warps * 32 <= REGISTERS, str(c)
        assert c.shared <= SHARED_LIMIT[arch], str(c)
        assert all(size >= 1 for size in c.grid), str(c)
        assert all(size <= 65535 for size in c.grid[1:]), str(c)
    if instruction := case.instructions.get(arch):
        assert instruction in compiled[0].ptx, f"{compiled[0]}: no {instruction}"


@pytest.mark.parametrize("dtype", EACH_DTYPE)
@pytest.mark.parametrize("arch", EACH_ARCHITECTURE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_compiles_without_spilling(case: Case, arch: int, dtype: torch.dtype) -> None:
    check(case, arch, compilations(arch, lambda: case.launch(dtype)))


@pytest.mark.parametrize("arch", [86, 120])
@pytest.mark.parametrize("rows", [64, 1024])
def test_tiles_fit_where_shared_memory_is_small(arch: int, rows: int) -> None:
    case = linear_logprob_case("gpt2", rows, 255)
    for c in compilations(arch, lambda: case.launch(torch.float16)):
        assert c.shared <= SHARED_LIMIT[arch] and c.spilled == 0, str(c)


@pytest.mark.parametrize("arch", [86, 120])
@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize(("max_q", "siblings"), [(1, 0), (8, 0), (16, 0), (512, 0), (5, 16)])
def test_attention_fits_where_shared_memory_is_small(
    max_q: int, siblings: int, model: str, arch: int
) -> None:
    case = paged_attention_case(model, 16, max_q, 1024, {}, siblings=siblings)
    for c in compilations(arch, lambda: case.launch(torch.float16)):
        assert c.shared <= SHARED_LIMIT[arch] and c.spilled == 0, str(c)


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize(("max_q", "siblings"), [(1, 0), (512, 0), (1, 16)])
def test_attention_in_float32_spills_nothing(max_q: int, siblings: int, model: str) -> None:
    case = paged_attention_case(model, 16, max_q, 1024, {}, siblings=siblings)
    for c in compilations(90, lambda: case.launch(torch.float32)):
        assert c.spilled == 0 and c.registers * c.num_warps * 32 <= REGISTERS, str(c)
        assert "tf32" not in c.ptx  # exact products only


@pytest.mark.parametrize(("siblings", "ragged"), [(0, False), (7, False), (7, True)])
def test_rows_and_bounds_compile_no_attention_anew(siblings: int, ragged: bool) -> None:
    """Rows, odd buffers and tables included, and bounds with one tile are one variant."""
    kernels = {
        (c.name, c.ptx)
        for rows, max_q, max_k in ((15, 5, 1000), (16, 6, 1024), (32, 7, 5000))
        for c in compilations(
            90,
            lambda rows=rows, max_q=max_q, max_k=max_k: paged_attention_case(  # type: ignore[misc]
                "8b", rows, max_q, max_k, {}, siblings=siblings, ragged=ragged
            ).launch(torch.bfloat16),
        )
    }
    assert len(kernels) == 2


@pytest.mark.parametrize("rows", [1, 16, 32])
def test_products_of_float32_spill_nothing(rows: int) -> None:
    case = linear_logprob_case("gpt2", rows, 128)
    compiled = compilations(90, lambda: case.launch(torch.float32))
    assert all(c.spilled == 0 and c.registers <= 128 for c in compiled), list(map(str, compiled))
    assert "tf32" not in compiled[0].ptx  # exact products only


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sixteen_rows_fill_the_largest_gpu(arch: int, model: str) -> None:
    for case in (token_logprob_case(model, 16, None, {}), linear_logprob_case(model, 16, 0)):
        first = compilations(arch, lambda case=case: case.launch(torch.bfloat16))[0]  # type: ignore[misc]
        assert first.programs >= SMS[arch], str(first)


def test_the_number_of_rows_compiles_nothing_anew() -> None:
    """17, 20 and 32 rows, odd buffers included, are one variant of each kernel."""
    kernels = {
        (c.name, c.ptx)
        for rows in (17, 20, 32)
        for c in compilations(
            90,
            lambda rows=rows: linear_logprob_case("gpt2", rows, 0).launch(torch.bfloat16),  # type: ignore[misc]
        )
    }
    assert len(kernels) == 2


@pytest.mark.parametrize("model", ["gpt2", "8b"])
def test_rows_of_one_program_and_of_several_are_one_kernel(model: str) -> None:
    """So that their sums are rounded alike."""
    kernels = [
        c
        for rows in (1, 17, 2048)
        for c in compilations(
            90,
            lambda rows=rows: token_logprob_case(model, rows, None, {}).launch(torch.bfloat16),  # type: ignore[misc]
        )
    ]
    assert [c.name for c in kernels].count("_merge_parts") == 2
    assert len({(c.name, c.ptx) for c in kernels}) == 2


def test_the_smallest_batches_compile_no_sampling_anew() -> None:
    """Any rows, and wherever their settings begin, are one variant of each kernel."""
    variants = {
        (c.name, c.variant)
        for rows, first in ((1, 0), (1, 1), (2, 0), (2, 3), (16, 0))
        for c in compilations(
            90,
            lambda rows=rows, first=first: sample_tokens_case(  # type: ignore[misc]
                900, {}, rows=rows, first=first
            ).launch(torch.bfloat16),
        )
    }
    assert sorted(name for name, _ in variants) == ["block_weights", "draw", "search", "summarise"]


def test_the_smallest_batches_compile_no_fusion_anew() -> None:
    """Of whole vectors: rows of an odd vocabulary begin where rows before them let them."""
    variants = {
        (c.name, c.variant)
        for rows in (1, 2, 16)
        for c in compilations(
            90,
            lambda rows=rows: fusion_case(128256, {}, rows).launch(torch.bfloat16),  # type: ignore[misc]
        )
    }
    assert sorted(name for name, _ in variants) == ["choose", "fuse", "grid_sums"]


def test_rounds_and_heads_compile_no_selection_anew() -> None:
    """Guides, splits, tokens and requests, odd buffers included, are one variant of each kernel."""
    kernels = {
        (c.name, c.ptx)
        for requests, splits, length in ((1, 1, 1), (3, 393, 5), (16, 1008, 16))
        for c in compilations(
            90,
            lambda requests=requests, splits=splits, length=length: score_select_case(  # type: ignore[misc]
                requests, 11, 0, splits, length
            ).launch(torch.bfloat16),
        )
    }
    assert len(kernels) == 2


def test_a_row_is_merged_in_one_order_whichever_kernel_merges_it() -> None:
    """The sums within threads and the exchanges between them, for one row and for two."""

    def sums(case: Case, kernel: str) -> list[str]:
        compiled = compilations(90, lambda: case.launch(torch.bfloat16))
        ptx = next(c.ptx for c in compiled if c.name == kernel)
        return re.findall(r"\b(?:add[.a-z]*f32|fma[.a-z]*f32|shfl.*, \d+, 31, -1)", ptx)

    def without_registers(found: list[str]) -> list[str]:
        return [re.sub(r"%\w+", "", x) for x in found]

    one = without_registers(sums(linear_logprob_case("gpt2", 16, 0), "_merge_splits"))
    both = without_registers(sums(score_select_case(64, 16, 0), "add_guide"))
    assert len([x for x in one if x.startswith("shfl")]) == 10
    assert both == 2 * one


def test_a_spill_would_be_seen() -> None:
    """The measure itself: far too large a tile has to spill."""
    case = linear_logprob_case("gpt2", 16, 0)
    too_large = linear_logprob._Launch(128, 64, depth=32, num_warps=1, num_stages=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_logprob, "_launch", lambda *_: too_large)
        compiled = compilations(80, lambda: case.launch(torch.float16))
    assert compiled[0].spilled > 0
