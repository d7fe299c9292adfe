"""Which passes of an engine are recorded as CUDA graphs, and compiled before: set up once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from w2s_fast.attention import Backend, KernelPlan
from w2s_fast.decoding.decode_graphs import DecodeGraphs
from w2s_fast.decoding.graphs import most_pass_tokens
from w2s_fast.decoding.pass_graphs import PassGraphs
from w2s_fast.decoding.recorder import CudaRecorder, Recorder
from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.models import PagedModel


def can_record(device: torch.device, backend: Backend) -> bool:
    """Whether passes run where CUDA graphs are, through attention that fits into them."""
    return device.type == "cuda" and backend is KernelPlan


def record_passes(
    base: PagedModel,
    guides: Sequence[PagedModel],
    *,
    vocab_size: int,
    max_rows: int,
    compile: bool = False,
    recorder_for: Callable[[torch.device], Recorder] = CudaRecorder,
) -> DecodeGraphs:
    """Let all models replay their small passes, and record the usual steps of the base.

    Each model is compared once more with its own eager forward, by a recorded pass.

    Args:
        guides: the models of all guides.
        vocab_size: ids from here on are never sampled.
        max_rows: the largest batch to be recorded.
        compile: run the models' bodies through ``torch.compile``, with one kernel where their own
            code has several. It takes minutes for large models, and pays if an engine lives long.

    Raises:
        UnsupportedModel: a recorded pass differs from the model's own forward.
    """
    recorder = recorder_for(base.device)
    body = _body(base, compile)
    for model in guides:
        model.replays = PassGraphs(
            model,
            _body(model, compile),
            recorder_for(model.device),  # the models of a guide run at once
            max_rows=max_rows,
            max_tokens=most_pass_tokens(max_rows),
        )
    base.replays = PassGraphs(base, body, recorder, max_rows=max_rows, max_tokens=max_rows)
    for model in (base, *guides):
        try:
            model.compare_with_eager()
            for recorded in model.recorded:
                while recorded.record_missed(1):
                    pass
            model.compare_with_eager()
        except UnsupportedModel as error:
            option = "compile" if compile else "cuda_graphs"
            raise UnsupportedModel(f"{error}; it is served with {option}=False") from error
    graphs = DecodeGraphs(base, body, recorder, max_rows=max_rows, vocab_size=vocab_size)
    graphs.warm_up()
    return graphs


def _body(model: PagedModel, compile: bool) -> nn.Module:
    body: nn.Module = model.view.base_model
    if not compile:
        return body
    # Layers are views of one tensor. Were its shape dynamic, torch 2.13's inductor would write all
    # layers' keys and values to the first one's place.
    torch._dynamo.mark_static(model.pool.kv)
    return cast(nn.Module, torch.compile(body, dynamic=True))


def refuse_compile() -> InvalidRequest:
    """Why ``compile=True`` cannot be served where nothing is recorded."""
    return InvalidRequest(
        "compile=True needs recorded passes: a CUDA device, cuda_graphs=True, and attention "
        "'triton' or 'auto'; leave it out"
    )
