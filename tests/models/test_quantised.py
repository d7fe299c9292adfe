"""Quantised models are read by their own loaders, and never moved or converted here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.adapters import LINEAR, save_adapter
from tests.support.tiny_models import byte_tokenizer, draw_weights, save_tiny, tiny_model
from w2s_fast import Engine, SearchParams
from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.models import Groups, find_adapter, read_adapter
from w2s_fast.models.load import load_model
from w2s_fast.models.model import PagedModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def loaded(**changed: Any) -> Any:
    """A model that says of itself what quantised ones do."""
    model: Any = copy.deepcopy(tiny_model("llama", dtype=torch.float32))
    for name, value in changed.items():
        setattr(model, name, value)
    return model


def quantised_config(folder: Path, **quantised: Any) -> Path:
    save_tiny(folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": quantised}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def int8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with int8 weights by torchao, of this dtype where they are unpacked; some are large
    enough that plain ones would go to oneDNN."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    folder = tmp_path_factory.mktemp("int8")
    config = LlamaConfig(
        vocab_size=258, hidden_size=512, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
        bos_token_id=256, eos_token_id=257, pad_token_id=None,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config, dtype=request.param)
    draw_weights(plain, seed=0, peak=2.0)
    plain.save_pretrained(folder / "plain")
    packed = AutoModelForCausalLM.from_pretrained(
        folder / "plain",
        quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()),
        dtype=request.param,
    )
    packed.save_pretrained(folder / "int8")
    byte_tokenizer().save_pretrained(folder / "int8")
    return folder / "int8"


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_torchao_models_answer_as_by_themselves(dtype: str, int8: Path) -> None:
    engine = Engine(base=int8, dtype=dtype, kv_cache_tokens=256)
    params = SearchParams(method="sample", temperature=0, max_new_tokens=8)
    (answer,) = engine.generate(["The film"], params)
    own = AutoModelForCausalLM.from_pretrained(int8, dtype=dtype)
    ids = torch.tensor([byte_tokenizer()("The film")["input_ids"]])
    expected = own.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    assert list(answer.token_ids) == expected.tolist()


def test_torchao_models_keep_their_dtype_and_their_packed_weights(int8: Path) -> None:
    """On a CPU, too, where a plain checkpoint would be read in float32."""
    model: Any = load_model(int8, CPU, "auto")
    saved = json.loads((int8 / "config.json").read_text())["dtype"]
    assert str(model.dtype) == f"torch.{saved}"
    assert load_model(model, CPU, "auto") is model
    assert type(model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    with pytest.raises(InvalidRequest, match=r"is quantised, on cpu in torch\.\w+, and"):
        load_model(model, CPU, "float16")


def test_an_adapter_stands_beside_packed_weights(int8: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = load_model(int8, CPU, "auto")
    plain = AutoModelForCausalLM.from_pretrained(int8.parent / "plain", dtype=model.dtype)
    settings = {"target_modules": LINEAR["llama"], "size": 0.05}
    files = find_adapter(save_adapter(plain, tmp_path, **settings))
    assert files is not None
    # Each is compared with what PEFT computes, and in the end with both in one pass.
    models = [
        PagedModel(model, name, kv_cache_tokens=256, adapter=own)
        for name, own in (("untuned", None), ("tuned", read_adapter(files, model)))
    ]
    assert Groups(models).members == [[0, 1]]


class Packed(torch.Tensor):
    """A weight that is no numbers in memory: it has torch's own operators, and no others."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> Any:
        make: Any = torch.Tensor._make_wrapper_subclass
        packed = make(cls, plain.shape, dtype=plain.dtype, device=plain.device)
        packed.plain = plain.detach()
        return packed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} of packed weights")
        if func is torch.ops.aten.detach.default:
            return cls(args[0].plain)
        plain = [arg.plain if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def test_packed_weights_are_left_to_their_own_products() -> None:
    """Of the head, too, in logits and in log-probs."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    packed = copy.deepcopy(plain)
    for module in (packed.lm_head, packed.model.layers[0].mlp.up_proj):
        module.weight = nn.Parameter(Packed(module.weight), requires_grad=False)
        assert type(module.weight) is Packed
    text = torch.tensor([3, 1, 4, 1, 5])
    found = []
    for model in (plain, packed):
        paged = PagedModel(model, kv_cache_tokens=256, page_size=4)
        hidden = paged.forward(paged.pool.allocate(1), text, [5])
        found.append((paged.logits(hidden), paged.token_partials(hidden, text).logprobs()))
    for own, other in zip(*found):
        assert torch.allclose(own, other, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "more", "package"),
    [
        ("bitsandbytes", {"load_in_8bit": True}, "bitsandbytes"),
        ("gptq", {"bits": 4, "group_size": 128, "desc_act": False}, "optimum|gptqmodel"),
        ("awq", {"bits": 4, "group_size": 128, "zero_point": True}, "gptqmodel|autoawq|accelerate"),
    ],
)
def test_a_loader_that_is_not_installed_is_named(
    method: str, more: dict[str, Any], package: str, tmp_path: Path
) -> None:
    folder = quantised_config(tmp_path, quant_method=method, **more)
    with pytest.raises(UnsupportedModel, match=rf"cannot be loaded: .*({package})"):
        load_model(folder, CPU, "auto")


@pytest.mark.parametrize(("dtype", "passed"), [("auto", "auto"), ("float16", torch.float16)])
def test_their_own_loader_puts_them_on_the_device(
    dtype: str, passed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    none: dict[str, Any] = dict.fromkeys(
        ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"), ()
    )
    model = loaded(is_quantized=True, quantization_method="bitsandbytes")

    def read(name: str, **options: Any) -> Any:
        given.update(options)
        return model, none

    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("moved")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(nn.Module, "to", touched)
    monkeypatch.setattr("w2s_fast.models.load.pick_dtype", lambda *_: torch.float16)
    folder = quantised_config(tmp_path, quant_method="bitsandbytes", load_in_8bit=True)
    assert load_model(folder, CUDA, dtype) is model
    assert given["device_map"] == {"": CUDA} and given["dtype"] == passed
    assert load_model(folder, CPU, dtype) is model


def test_a_loaded_one_is_neither_moved_nor_converted() -> None:
    model = loaded(is_quantized=True, quantization_method="bitsandbytes")
    assert load_model(model, CPU, "auto") is model
    assert load_model(model, CPU, "float32") is model
    for device, dtype in ((CPU, "float16"), (torch.device("meta"), "auto")):
        with pytest.raises(
            InvalidRequest, match=r"quantised, on cpu in torch\.float32, and is not"
        ):
            load_model(model, device, dtype)
    assert {(p.dtype, p.device) for p in model.parameters()} == {(torch.float32, CPU)}


def test_a_loaded_one_has_to_lie_on_one_device() -> None:
    spread = loaded(hf_device_map={"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"})
    with pytest.raises(InvalidRequest, match=r"LlamaForCausalLM is spread over 0, 1, cpu by its"):
        load_model(spread, CPU, "auto")
    together = loaded(hf_device_map={"": "cpu"})
    assert load_model(together, CPU, "auto") is together
