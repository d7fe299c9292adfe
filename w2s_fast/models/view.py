"""ModelView: a caller's model with modules and settings of our own around the same weights.

A pass must run in eval mode and with our attention, whatever the caller's model is set to, and
nobody else may see that: not the caller, not another engine, not another thread. So the caller's
modules are never touched. Each has a twin of the same class, made once: parameters and hooks are
the caller's own, while the training flag, the config and what else a module keeps are the twin's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# What every module has. Parameters and hooks are shared: who replaces or adds one is followed.
_SHARED = frozenset(vars(nn.Module())) - {"training", "_modules", "_buffers"}
# Compiled code of the caller's own modules, of which it runs the forward.
_LEFT_OUT = "_compiled_call_impl"
# Another forward for a module of some kinds, called with the module; or None.
Forwards = Callable[[nn.Module], Callable[..., Any] | None]


class ModelView:
    """The twins of a model's modules.

    Attributes:
        model: the twin of the model itself, in eval mode, with the attention that was asked for.
    """

    def __init__(
        self, model: PreTrainedModel, attention: str, forwards: Forwards | None = None
    ) -> None:
        """Make the twins. Takes some microseconds a module and no memory for weights.

        Args:
            forwards: what twins compute by other means than their class does.

        Raises:
            ValueError: a module's forward was replaced by something that cannot have a twin.
        """
        self._attention = attention
        self._forwards = forwards or (lambda _: None)
        # By the id of the original, which is kept so that its id stays its own.
        self._twins: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._configs: dict[int, Any] = {}
        self.model = cast(PreTrainedModel, self._twin(model))

    def follow(self) -> None:
        """Take over what the caller has set on modules or replaced in them since."""
        for original, twin in list(self._twins.values()):
            state = self._state(original, twin)
            vars(twin).clear()
            vars(twin).update(state)

    def _twin(self, module: nn.Module) -> nn.Module:
        known = self._twins.get(id(module))
        if known is not None:
            return known[1]
        twin: nn.Module = type(module).__new__(type(module))
        self._twins[id(module)] = (module, twin)
        vars(twin).update(self._state(module, twin))
        return twin

    def _state(self, module: nn.Module, twin: nn.Module) -> dict[str, Any]:
        own = dict(vars(module))
        state = {
            name: value if name in _SHARED else self._ours(value)
            for name, value in own.items()
            if name != _LEFT_OUT
        }
        if "forward" in own:
            _check_replaced_forward(module, own["forward"])
        elif (forward := self._forwards(module)) is not None:
            state["forward"] = MethodType(forward, twin)
        # Buffers are shared one by one: some models replace theirs while they run.
        state["_buffers"] = dict(module._buffers)
        state["training"] = False
        return state

    def _ours(self, value: Any) -> Any:
        """The value, with twins in the place of modules and our configs in the place of theirs."""
        if isinstance(value, nn.Module):
            return self._twin(value)
        if isinstance(value, PreTrainedConfig):
            return self._config(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self._twin(value.__self__))
        if isinstance(value, functools.partial):
            args, keywords = self._ours(value.args), self._ours(value.keywords)
            return functools.partial(self._ours(value.func), *args, **keywords)
        if type(value) in (list, tuple):
            items = [self._ours(item) for item in value]
            changed = any(a is not b for a, b in zip(items, value))
            return type(value)(items) if changed else value
        if type(value) is dict:
            ours = {key: self._ours(item) for key, item in value.items()}
            return ours if any(ours[key] is not value[key] for key in value) else value
        return value

    def _config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        known = id(config) in self._configs
        ours: Any = copy.deepcopy(config, self._configs)
        if not known:
            ours.output_attentions = ours.output_hidden_states = False
            if hasattr(ours, "output_router_logits"):
                ours.output_router_logits = False
            ours.return_dict = True
            ours._attn_implementation = self._attention  # in the configs inside of it as well
            # Nothing is padded here; some models would look for this token in every pass, for which
            # the host waits.
            for config in _with_inner(ours):
                config.pad_token_id = None
        return cast(PreTrainedConfig, ours)


def _with_inner(config: Any) -> Iterator[Any]:
    """A config, and the configs inside of it."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _with_inner(inner)


def _check_replaced_forward(module: nn.Module, forward: Any) -> None:
    """A forward that was put in the place of the class's own must run on the twin, too."""
    if isinstance(forward, (MethodType, functools.partial)):
        return
    cells = forward.__closure__ or () if isinstance(forward, FunctionType) else None
    if cells is None or any(_holds_model(cell.cell_contents) for cell in cells):
        raise ValueError(
            f"the forward of its {type(module).__name__} was replaced by a "
            f"{type(forward).__name__} that holds on to the model it was made for"
        )


def _holds_model(value: Any) -> bool:
    return isinstance(getattr(value, "__self__", value), (nn.Module, PreTrainedConfig))
