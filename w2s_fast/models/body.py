"""Runs a Hugging Face model's own code: its body over one row of tokens, with paged attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from w2s_fast.attention import ATTENTION_NAME, Attends
from w2s_fast.errors import UnsupportedModel
from w2s_fast.models.adapters import Adapter
from w2s_fast.models.deltas import Bounds, with_deltas
from w2s_fast.models.forwards import forward_of
from w2s_fast.models.inference import inference
from w2s_fast.models.view import ModelView

PROBE_TOKENS = 6
# Runs a model's body, as its forward is called.
Body = Callable[..., Any]


def view_of(
    model: PreTrainedModel,
    name: str,
    attention: str = ATTENTION_NAME,
    adapter: Adapter | None = None,
) -> ModelView:
    """A view of the model, named as errors call it. UnsupportedModel: it cannot have one."""

    def forward(module: nn.Module) -> Callable[..., Any] | None:
        own = forward_of(module)
        delta = None if adapter is None else adapter.delta_of(module)
        if delta is None:
            return own
        return with_deltas(own or type(module).forward, [delta], Bounds())

    try:
        # What pages are compared with is the model's own in its products, too.
        return ModelView(model, attention, forward if attention == ATTENTION_NAME else None)
    except Exception as error:  # a model's modules may hold anything
        raise refuse(model, name, f"no view of its modules can be made: {error}") from error


@inference
def run_body(
    view: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    plan: Attends,
    body: Body | None = None,
) -> Tensor:
    """A model's body over one row of tokens: last hidden states [T, D].

    ``view``: ours of the model, under paged attention. ``body``: what to run in the place of
    ``view.base_model``: the same, compiled.
    """
    with undisturbed(tokens.device):
        out = (view.base_model if body is None else body)(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            past_key_values=None,
            w2s_plan=plan,
        )
    hidden: Tensor = out.last_hidden_state
    return hidden[0]


def eager_logits(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    name: str,
    own: PreTrainedModel | None = None,
) -> list[Tensor]:
    """Logits [T, V] of each text int64 [T], by the model's own forward with eager attention.

    ``own``: what runs in its place: a view of it, with eager attention.
    """
    view = view_of(model, name, "eager").model if own is None else own
    try:
        with torch.inference_mode(), undisturbed(model.device):
            return [view(input_ids=text[None], use_cache=False).logits[0] for text in texts]
    except Exception as error:
        raise refuse(model, name, f"its own forward failed: {error}") from error


@contextmanager
def _undisturbed(device: torch.device, current: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if not current:
            stack.enter_context(torch.cuda.device(device))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def undisturbed(device: torch.device) -> AbstractContextManager[Any]:
    """For work on a device, whatever the caller has switched on around us: products are in the
    weights' own dtype, and of several CUDA devices it is the current one.

    Some libraries launch their kernels on the current device, and events are of its stream.
    """
    current = device.type != "cuda" or torch.cuda.current_device() == device.index
    if current and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return _undisturbed(device, current)


def probe_ids(model: PreTrainedModel, count: int) -> Tensor:
    size = int(model.config.get_text_config().vocab_size)
    return torch.arange(1, count + 1, device=model.device) * 7 % size


def refuse(model: PreTrainedModel, name: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name}: {type(model).__name__} ({model.config.model_type}) cannot be served: {why}"
    )
