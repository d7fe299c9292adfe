"""Guides that are an adapter beside a model: the pass of both sides, and the memory.

``doubled`` is a pass of the model alone with as many rows; ``python -m bench.adapters`` compares
them within turns. Memory is counted by tensors.
"""

from __future__ import annotations

import copy
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import PreTrainedModel

from bench.adapters import ALL, DRY, Rows, adapted, served
from bench.random_models import make
from w2s_fast.models import find_adapter, read_adapter

ROWS = 16


@cache
def small() -> PreTrainedModel:
    return make(DRY, 0, torch.device("cpu"), torch.float32)


@pytest.mark.benchmark(group="adapters")
@pytest.mark.parametrize("way", ["one pass", "doubled"])
def test_scoring(benchmark: BenchmarkFixture, way: str) -> None:
    if way == "one pass":
        models = [served(small()), served(small(), adapted(small(), 16, ALL))]
        run = Rows(models, ROWS).together
    else:
        run = Rows([served(small())], 2 * ROWS).apart
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


def test_memory() -> None:
    """No time is taken: what is held is at most 1.1 x one model, its adapter and the pages."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, target_modules=list(ALL), task_type="CAUSAL_LM")
    with TemporaryDirectory() as folder:
        peft.get_peft_model(copy.deepcopy(small()), config).save_pretrained(folder)
        files = find_adapter(folder)
        assert files is not None
        adapter = read_adapter(files, small())
    models = [served(small()), served(small(), adapter)]
    held = {}
    for holder in (small(), adapter.reference, *(model.view for model in models)):
        for tensor in (*holder.parameters(), *holder.buffers()):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    weights = sum({p.data_ptr(): p.nbytes for p in small().parameters()}.values())
    lora = sum(p.nbytes for name, p in adapter.reference.named_parameters() if "lora_" in name)
    pages = sum(model.pool.kv.nbytes for model in models)
    ratio = (sum(held.values()) + pages) / (weights + lora + pages)
    print(
        f"one model {weights / 1e6:.1f}, adapter {lora / 1e6:.1f}, pages {pages / 1e6:.1f} MB; "
        f"held beside pages {sum(held.values()) / 1e6:.1f} MB: {ratio:.3f} x"
    )
    assert ratio < 1.1 and sum(held.values()) < 1.1 * (weights + lora)
