"""Guides that are an adapter beside a model: the time of a scoring pass, and the memory.

What is timed scores chunks with both sides in one pass of T + T tokens. ``-s`` shows its ratios,
within turns, to a pass of the model alone with as many rows (at most 1.25), and to both sides one
after the other.

Memory is counted by tensors: weights of all models and adapters and pages of an engine with a guide
that is an adapter, against what one model, the adapter and the pages take.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from w2s_fast.models import Adapter, Groups, PagedModel, find_adapter, read_adapter

pytest.importorskip("peft")
pytestmark = pytest.mark.benchmark(group="adapters")

ROWS, CHUNK = 16, 5  # of a usual search
HELD = 64  # tokens that a row has
TURNS = 9


@cache
def small() -> PreTrainedModel:
    """Of the shape of a small guide, as SmolLM2-135M, with half of its layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=15,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


@cache
def adapter(rank: int, modules: str) -> Adapter:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, target_modules=modules if modules == "all-linear" else modules.split(","),
        task_type="CAUSAL_LM", init_lora_weights="gaussian",
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        get_peft_model(copy.deepcopy(small()), config).save_pretrained(folder)
        files = find_adapter(folder)
        assert files is not None
        return read_adapter(files, small())


def served(own: Adapter | None) -> PagedModel:
    return PagedModel(small(), kv_cache_tokens=1 << 12, max_slots=256, adapter=own)


class Rows:
    """Rows of some models, each with tokens in its pages, that score a chunk again and again."""

    def __init__(self, models: list[PagedModel], rows: int = ROWS) -> None:
        self.models, self.groups = models, Groups(models)
        self.slots = [model.pool.allocate(rows) for model in models]
        self.counts = [CHUNK] * rows
        drawn = torch.Generator().manual_seed(0)
        held = torch.randint(49152, (rows * HELD,), generator=drawn)
        self.tokens = torch.randint(49152, (rows * CHUNK,), generator=drawn)
        for model, slots in zip(models, self.slots):
            model.forward(slots, held, [HELD] * rows)

    @torch.inference_mode()
    def together(self) -> None:
        new = [self.tokens] * len(self.models)
        counts = [self.counts] * len(self.models)
        for m, _, hidden in self.groups.forward(0, self.slots, new, counts):
            self._score(m, hidden)

    @torch.inference_mode()
    def apart(self) -> None:
        for m, (model, slots) in enumerate(zip(self.models, self.slots)):
            self._score(m, model.forward(slots, self.tokens, self.counts))

    def _score(self, m: int, hidden: Tensor) -> None:
        model, slots = self.models[m], self.slots[m]
        model.token_partials(hidden, self.tokens).logprobs()
        model.pool.truncate(slots, [HELD] * len(slots))


@pytest.mark.parametrize(
    ("rank", "modules"), [(4, "q_proj,v_proj"), (16, "all-linear")], ids=["r4 q,v", "r16 all"]
)
def test_scoring(benchmark: BenchmarkFixture, rank: int, modules: str) -> None:
    both = [served(None), served(adapter(rank, modules))]
    ways: dict[str, Callable[[], Any]] = {
        "pass": Rows(both).together,
        "doubled": Rows([served(None)], 2 * ROWS).apart,
        "apart": Rows(both).apart,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name in ("doubled", "apart"):
        ratios = [own / other for own, other in zip(seconds["pass"][1:], seconds[name][1:])]
        benchmark.extra_info[f"to {name}"] = statistics.median(ratios)
        print(f"one pass to {name}: {statistics.median(ratios):.3f} x")
    benchmark.pedantic(ways["pass"], rounds=3)


def test_memory() -> None:
    """No time is taken: what an engine holds is at most 1.1 x one model, adapter and pages."""
    own = adapter(16, "all-linear")
    models = [served(None), served(own)]
    held: dict[int, int] = {}
    for model in models:
        for holder in (
            model.model,
            model.view,
            *([] if model.adapter is None else [own.reference]),
        ):
            for tensor in (*holder.parameters(), *holder.buffers()):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held[model.pool.kv.untyped_storage().data_ptr()] = model.pool.kv.nbytes
    weights = sum({p.data_ptr(): p.nbytes for p in small().parameters()}.values())
    lora = sum(p.nbytes for name, p in own.reference.named_parameters() if "lora_" in name)
    pages = sum(model.pool.kv.nbytes for model in models)
    ratio = sum(held.values()) / (weights + lora + pages)
    print(
        f"held {sum(held.values()) / 1e6:.1f} MB; one model {weights / 1e6:.1f}, "
        f"adapter {lora / 1e6:.1f}, pages {pages / 1e6:.1f} MB: {ratio:.3f} x"
    )
    assert ratio < 1.1
