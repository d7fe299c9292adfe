"""Sharding: a model of which each rank holds the attention heads and MLP columns of its own.

transformers reads the checkpoint by the model's own plan, so that no rank holds all of it. What it
leaves, DTensors and forwards around those of the modules, is turned into a model of plain tensors:
the passes here then run as any other model's, and differ in one module only, the linear one whose
products are added up over the ranks.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from w2s_fast.errors import UnsupportedModel
from w2s_fast.models.ranks import Ranks

_COLUMNS, _ROWS = "colwise", "rowwise"
# Modules that every rank has all of: whose output all of them need, as that of the LM head and of
# embeddings, or that work on one head at a time. What their styles gather is there then.
_WHOLE = frozenset(
    (
        "colwise_gather_output",
        "colwise_rep",
        "embedding_colwise",
        "embedding_rowwise",
        "replicate",
        "replicated_with_grad_allreduce",
        "rowwise_rep",
        "rowwise_split_input",
    )
)


class RowLinear(nn.Linear):
    """A linear module of which each rank has some of the inputs; what comes out is whole."""

    ranks: Ranks

    def forward(self, input: Tensor) -> Tensor:
        """[..., D / size] -> [..., V]."""
        out = self.ranks.add(nn.functional.linear(input, self.weight))
        return out if self.bias is None else out + self.bias


def why_not(config: PreTrainedConfig, size: int) -> str | None:
    """Why a model of this config cannot be divided among so many ranks; None: it can."""
    text: Any = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or {}
    if not plan:
        return "transformers has no tensor-parallel plan for it"
    if why := _unknown_style(plan):
        return why
    heads = {
        name: int(count)
        for name in ("num_attention_heads", "num_key_value_heads")
        if (count := getattr(text, name, None)) is not None
    }
    for name, count in heads.items():
        if count % size:
            return f"{name} is {count}; allowed: a multiple of {size}"
    return None


def _unknown_style(plan: dict[str, str]) -> str | None:
    others = sorted({style for style in plan.values() if style not in (_COLUMNS, _ROWS, *_WHOLE)})
    if others:
        return f"its plan has parts of a kind that is not served ({', '.join(others)})"
    if not any(name.endswith("k_proj") and plan[name] == _COLUMNS for name in plan):
        return "its plan does not deal out the keys' heads"
    return None


def own_part(model: PreTrainedModel, ranks: Ranks) -> None:
    """Turn a model that transformers has read for one of several ranks into plain tensors.

    UnsupportedModel: its plan has parts of a kind that is not served.
    """
    untyped: Any = model
    plan: dict[str, str] = untyped.tp_plan
    if why := _unknown_style(plan):
        raise UnsupportedModel(f"{type(model).__name__} cannot be divided: {why}")
    whole: dict[int, nn.Parameter] = {}  # by what was read: of tied weights there is one
    ends = (untyped.get_input_embeddings(), untyped.get_output_embeddings())
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        local = style in (_COLUMNS, _ROWS) and module not in ends
        if style is not None:
            vars(module).pop("forward", None)
        for key, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if local:
                module._parameters[key] = _plain(parameter.to_local())
                continue
            if id(parameter) not in whole:
                whole[id(parameter)] = _plain(parameter.full_tensor())
            module._parameters[key] = whole[id(parameter)]
        if local and style == _ROWS:
            if type(module) is not nn.Linear:
                raise UnsupportedModel(
                    f"{type(model).__name__} cannot be divided: {name} is a "
                    f"{type(module).__name__}; allowed: Linear"
                )
            module.__class__ = RowLinear
            untyped_module: Any = module
            untyped_module.ranks = ranks
    untyped.config.distributed_config = None


def _plain(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=value.requires_grad)
