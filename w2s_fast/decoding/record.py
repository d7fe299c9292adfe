"""Which passes of an engine are recorded as CUDA graphs, and compiled before: set up once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config
from torch import Tensor

from w2s_fast.attention import Backend, KernelPlan
from w2s_fast.decoding.decode_graphs import DecodeGraphs
from w2s_fast.decoding.drawing import Drawing
from w2s_fast.decoding.fusion import GuideRoles
from w2s_fast.decoding.graphs import most_pass_tokens
from w2s_fast.decoding.lane import Lane
from w2s_fast.decoding.pass_graphs import PassGraphs
from w2s_fast.decoding.recorder import CudaRecorder, Recorder
from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.models import Body, Groups, PagedModel

# Two sizes that happen to be equal are not taken for one: else passes are compiled anew for as many
# shapes as there are coincidences.
_FEW_VARIANTS = partial(
    torch.fx.experimental._config.patch,  # type: ignore[attr-defined]
    use_duck_shape=False,
)
# Of functions that all models have in common, as those that wrap every model's forward are. Beyond
# its limit, by default 8, torch runs everything as it is written, and says so only in a log.
# A model's own numbers, as the scale of its attention, never vary: taken for variables, they make
# torch trace a pass a second time to find that out.
_ONCE_AND_KEPT = partial(
    torch._dynamo.config.patch,
    recompile_limit=64,
    specialize_float=True,
)


class RecordedSteps(NamedTuple):
    """Recorded steps of decoding.

    Attributes:
        alone: of the base, the usual ones recorded. together: of the base and its guides, recorded
            when they come; None: there are no guides.
    """

    alone: DecodeGraphs
    together: DecodeGraphs | None


def can_record(device: torch.device, backend: Backend) -> bool:
    """Whether passes run where CUDA graphs are, through attention that fits into them."""
    return device.type == "cuda" and backend is KernelPlan


def record_passes(
    base: PagedModel,
    guides: Sequence[PagedModel],
    *,
    vocab_size: int,
    max_rows: int,
    roles: GuideRoles = (),
    compile: bool = False,
    recorder_for: Callable[[torch.device], Recorder] = CudaRecorder,
) -> RecordedSteps:
    """Let all models replay their small passes, and record the usual steps of the base.

    Each model is compared once more with its own eager forward, by a recorded pass.

    Args:
        guides: the models of all guides. roles: where each guide's stand among base and guides.
        vocab_size: ids from here on are never sampled.
        max_rows: the largest batch to be recorded.
        compile: run the models' bodies through ``torch.compile``, with one kernel where their own
            code has several. It takes minutes for large models, and pays if an engine lives long.

    Raises:
        UnsupportedModel: a recorded pass differs from the model's own forward.
    """
    recorder = recorder_for(base.device)
    models = [base, *guides]
    bodies = [_body(model, compile) for model in models]
    for model, body in zip(guides, bodies[1:]):
        model.replays = PassGraphs(
            model,
            body,
            recorder_for(model.device),  # the models of a guide run at once
            max_rows=max_rows,
            max_tokens=most_pass_tokens(max_rows),
        )
    base.replays = PassGraphs(base, bodies[0], recorder, max_rows=max_rows, max_tokens=max_rows)
    for model in models:
        try:
            model.compare_with_eager()
            for recorded in model.recorded:
                while recorded.record_missed(1):
                    pass
            model.compare_with_eager()
        except UnsupportedModel as error:
            option = "compile" if compile else "cuda_graphs"
            raise UnsupportedModel(f"{error}; it is served with {option}=False") from error
    lane = Lane(base.device)
    alone = Drawing(Groups([base]), bodies[:1], (), vocab_size, lane)
    steps = DecodeGraphs(alone, recorder, max_rows=max_rows)
    steps.warm_up()
    if not roles:
        return RecordedSteps(steps, None)
    together = Drawing(Groups(models), bodies, roles, vocab_size, lane)
    return RecordedSteps(steps, DecodeGraphs(together, recorder, max_rows=max_rows))


def _body(model: PagedModel, compile: bool) -> Body:
    body: Body = model.view.base_model
    if not compile:
        return body
    # Layers are views of one tensor. Were its shape dynamic, torch 2.13's inductor would write all
    # layers' keys and values to the first one's place.
    torch._dynamo.mark_static(model.pool.kv)
    compiled = torch.compile(body, dynamic=True)

    def run(*, input_ids: Tensor, **inputs: Any) -> Any:
        if input_ids.storage_offset():  # compiled anew for those, see PassFields
            input_ids = input_ids.clone()
        with _FEW_VARIANTS(), _ONCE_AND_KEPT():
            return compiled(input_ids=input_ids, **inputs)

    return run


def refuse_compile() -> InvalidRequest:
    """Why ``compile=True`` cannot be served where nothing is recorded."""
    return InvalidRequest(
        "compile=True needs recorded passes: a CUDA device, cuda_graphs=True, and attention "
        "'triton' or 'auto'; leave it out"
    )
