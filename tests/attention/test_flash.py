"""flash-attn is asked for what the model needs: seen with stand-ins, since it needs a GPU.

Models with grouped heads (llama), windows (mistral), both and soft-caps (gemma2) run through them
and must equal their own eager forward.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from tests.attention import flash_stand_ins
from tests.support.tiny_models import VOCABULARY, tiny_model
from w2s_fast.attention import flash
from w2s_fast.attention.flash import FlashAttention, FlashPlan
from w2s_fast.decoding import Decoding
from w2s_fast.errors import InvalidRequest
from w2s_fast.models.model import PagedModel
from w2s_fast.models.probe import kv_shape

CUDA = torch.device("cuda")
VERSIONS: dict[int, FlashAttention] = {
    2: FlashAttention(2, flash_stand_ins.flash_attn_varlen_func),
    3: FlashAttention(3, flash_stand_ins.flash_attn_with_kvcache),
}
FAMILIES = ["gpt2", "llama", "mistral", "gemma2"]


def paged(family: str, version: int) -> PagedModel:
    model = PagedModel(
        tiny_model(family, dtype=torch.float32), kv_cache_tokens=512, page_size=4, max_slots=8
    )
    model.backend = VERSIONS[version]
    model.pool.kv.fill_(torch.nan)  # what stands beyond a length must not be read
    return model


def texts(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def assert_eager(model: PagedModel, text: Tensor, ours: Tensor) -> None:
    with torch.no_grad():
        theirs = model.model(input_ids=text[None], use_cache=False).logits[0, -len(ours) :]
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_append_equal_the_eager_forward(family: str, version: int) -> None:
    model = paged(family, version)
    lengths, cuts = (19, 7, 33), (12, 1, 30)
    all_texts = texts(lengths)
    slots = model.pool.allocate(3)
    first = torch.cat([text[:cut] for text, cut in zip(all_texts, cuts)])
    second = torch.cat([text[cut:] for text, cut in zip(all_texts, cuts)])
    rest = [n - cut for n, cut in zip(lengths, cuts)]
    before = model.logits(model.forward(slots, first, cuts)).split(cuts)
    after = model.logits(model.forward(slots, second, rest)).split(rest)
    for text, own in zip(all_texts, zip(before, after)):
        assert_eager(model, text, torch.cat(own))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_decoded_under_one_plan_equals_the_eager_forward(family: str, version: int) -> None:
    model = paged(family, version)
    prompts, steps = (3, 9, 6), 7  # steps cross the borders of pages of 4
    all_texts = texts([n + steps for n in prompts])
    slots = model.pool.allocate(3)
    model.forward(slots, torch.cat([t[:n] for t, n in zip(all_texts, prompts)]), prompts)
    decoding = Decoding(model, slots, steps)
    logits = []
    for step in range(steps):
        tokens = torch.stack([t[n + step] for t, n in zip(all_texts, prompts)])
        logits.append(model.logits(decoding.step(tokens)))
    for row, text in enumerate(all_texts):
        assert_eager(model, text, torch.stack([step[row] for step in logits]))
    assert isinstance(decoding.plan, FlashPlan)


# --- which library is found


class Machine:
    """A GPU of sm_90, or what a test makes of it, where no flash-attn is installed yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arch = 90
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(flash, "gpu", lambda device: self)
        for name in flash_stand_ins.modules():
            self.install(name, None)

    def install(self, name: str, library: ModuleType | None) -> None:
        self._monkeypatch.setitem(sys.modules, name, library)

    def install_stand_ins(self, *names: str) -> None:
        for name in names:
            self.install(name, flash_stand_ins.modules()[name])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("installed", "sm", "version"),
    [
        (("flash_attn",), 80, 2),
        (("flash_attn",), 90, 2),
        (("flash_attn_interface",), 90, 3),
        (("flash_attn", "flash_attn_interface"), 90, 3),
        (("flash_attn", "flash_attn_interface"), 89, 2),
        (("flash_attn", "flash_attn_interface"), 120, 2),
    ],
)
def test_version_3_serves_hopper_and_version_2_the_others(
    installed: tuple[str, ...], sm: int, version: int, machine: Machine
) -> None:
    machine.arch = sm
    machine.install_stand_ins(*installed)
    assert FlashAttention.find(CUDA) == VERSIONS[version]


def refusal(device: torch.device = CUDA) -> str:
    with pytest.raises(InvalidRequest) as refused:
        FlashAttention.find(device)
    return str(refused.value)


def test_without_a_gpu_it_says_what_to_pass() -> None:
    assert refusal(torch.device("cpu")) == (
        "attention 'flash' runs on CUDA devices, and this is cpu: pass attention='torch', or 'auto'"
    )


def test_an_old_gpu_is_named(machine: Machine) -> None:
    machine.arch = 75
    machine.install_stand_ins("flash_attn")
    assert "needs a GPU of sm_80 or newer, and this is sm_75" in refusal()


@pytest.mark.usefixtures("machine")
def test_where_nothing_is_installed_it_says_how_to() -> None:
    assert refusal() == (
        "attention 'flash' cannot run: flash-attn 3 is not installed; flash-attn 2 is not "
        "installed. To install it: pip install flash-attn --no-build-isolation; or pass "
        "attention='auto'"
    )


def test_version_3_does_not_serve_other_gpus(machine: Machine) -> None:
    machine.arch = 80
    machine.install_stand_ins("flash_attn_interface")
    assert "cannot run: flash-attn 2 is not installed." in refusal()


def test_a_library_without_the_function_is_not_flash_attn_2(machine: Machine) -> None:
    machine.arch = 80
    machine.install("flash_attn", ModuleType("flash_attn"))  # of version 4
    assert "flash-attn 2 is not installed: flash_attn has no flash_attn_varlen_func." in refusal()


def test_a_library_that_lacks_a_parameter_is_too_old(machine: Machine) -> None:
    machine.arch = 80
    old = ModuleType("flash_attn")
    old.flash_attn_varlen_func = lambda q, k, v, window_size: None  # type: ignore[attr-defined]
    machine.install("flash_attn", old)
    lacking = "flash-attn 2 is too old: flash_attn_varlen_func has no block_table, softcap."
    assert lacking in refusal()


def test_a_library_built_for_another_torch_says_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> ModuleType:
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10")

    machine.arch = 80
    monkeypatch.setattr(flash, "import_module", fails)
    assert "flash-attn 2 cannot be imported: flash_attn_2_cuda.so: undefined" in refusal()


# --- which models it serves


Version = Literal[2, 3]


@pytest.mark.parametrize(
    ("version", "dtype", "page_size", "head_dim"),
    [
        (2, torch.float16, 256, 64),
        (2, torch.bfloat16, 512, 256),
        (3, torch.bfloat16, 16, 128),
        (3, torch.float16, 1, 8),
    ],
)
def test_what_it_serves(
    version: Version, dtype: torch.dtype, page_size: int, head_dim: int
) -> None:
    VERSIONS[version].check("base", dtype, page_size, head_dim, sinks=False)


# One of the models that each version serves; the rows below say what is different.
SERVED: dict[Version, dict[str, Any]] = {
    2: {"dtype": torch.float16, "page_size": 256, "head_dim": 64, "sinks": False},
    3: {"dtype": torch.float16, "page_size": 16, "head_dim": 64, "sinks": False},
}


@pytest.mark.parametrize(
    ("version", "different", "message"),
    [
        (
            2, {"dtype": torch.float32},
            "flash-attn 2 serves float16 and bfloat16, and base 'x' is float32: pass "
            "dtype='bfloat16', or attention='auto'",
        ),
        (
            2, {"page_size": 16},
            "flash-attn 2 wants page_size to be a multiple of 256, and it is 16: pass "
            "page_size=256",
        ),
        (
            3, {"page_size": 64},
            "flash-attn 3 wants page_size below 64, since it does not mask what is unwritten in "
            "larger pages, and it is 64: pass page_size=16",
        ),
        (
            2, {"head_dim": 512},
            "flash-attn 2 serves head sizes up to 256 that are multiples of 8, and base 'x' has "
            "512: pass attention='auto'",
        ),
        (
            3, {"head_dim": 100},
            "flash-attn 3 serves head sizes up to 256 that are multiples of 8, and base 'x' has "
            "100: pass attention='auto'",
        ),
        (
            3, {"sinks": True},
            "flash-attn 3 knows no attention sinks, and base 'x' has them: pass attention='auto'",
        ),
    ],
)  # fmt: skip
def test_what_it_does_not_serve_is_refused_with_the_reason(
    version: Version, different: dict[str, Any], message: str
) -> None:
    VERSIONS[version].check("base 'x'", **SERVED[version])
    with pytest.raises(InvalidRequest) as refused:
        VERSIONS[version].check("base 'x'", **{**SERVED[version], **different})
    assert str(refused.value) == message


def test_the_probe_sees_whether_a_model_has_sinks() -> None:
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2,
        num_experts_per_tok=1, max_position_embeddings=128, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    assert kv_shape(GptOssForCausalLM(config)).sinks
    assert not kv_shape(tiny_model("gemma2")).sinks


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_is_loaded_with_it_only_if_it_serves_that_model(
    version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashAttention, "find", lambda device: VERSIONS[version])
    page_size = {2: 256, 3: 16}[version]
    options: dict[str, Any] = {"kv_cache_tokens": 512, "page_size": page_size, "max_slots": 8}
    half = tiny_model("gemma2", dtype=torch.float16)
    assert PagedModel(half, attention="flash", **options).backend == VERSIONS[version]
    with pytest.raises(InvalidRequest, match="tuned is float32"):
        PagedModel(tiny_model("gpt2", dtype=torch.float32), "tuned", attention="flash", **options)
