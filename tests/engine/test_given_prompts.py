"""What callers pass as prompts and as models: taken for what it is, or refused with the way out."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.engines import engine
from tests.support.gguf_files import gguf_llama, needs_gguf, write_gguf
from tests.support.tiny_models import byte_tokenizer, save_tiny, tiny_model
from w2s_fast import Chat, Engine, SearchParams
from w2s_fast.errors import InvalidRequest
from w2s_fast.models import load_model

IDS = [3, 1, 4, 1]
SHORT = SearchParams(max_new_tokens=5)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def tokens(e: Engine, prompts: Any) -> list[list[int]]:
    return [result.token_ids for result in e.generate(prompts, SHORT)]


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        tuple(IDS),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        np.array(IDS),
        [torch.tensor(IDS)],
        [np.array(IDS, dtype=np.uint16)],
    ],
    ids=lambda given: type(given).__name__,
)
def test_token_ids_alone_are_a_prompt_and_so_is_a_tensor_of_them(given: Any) -> None:
    assert tokens(engine(), given) == tokens(engine(), [IDS])


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    folder = save_tiny(tmp_path_factory.mktemp("chatty"), tokenizer=tokenizer)
    return Engine(folder, device="cpu", kv_cache_tokens=1024)


@pytest.mark.parametrize("given", [MESSAGES, tuple(MESSAGES), Chat(MESSAGES)])
def test_messages_alone_are_a_prompt(chatty: Engine, given: Any) -> None:
    sample = SearchParams(method="sample", max_new_tokens=5)
    (alone,), (listed,) = (chatty.generate(g, sample) for g in (given, [MESSAGES]))
    assert alone.token_ids == listed.token_ids
    (one,), (in_a_list,) = (chatty.generate(g, sample) for g in (MESSAGES[1], [MESSAGES[1:]]))
    assert one.token_ids == in_a_list.token_ids != alone.token_ids
    assert [i for i, _ in chatty.as_completed(given, sample)] == [0]


@pytest.mark.parametrize("padded", [False, True])
def test_encodings_are_refused_with_the_way_out(chatty: Engine, padded: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["Hi", "Hello"] if padded else ["Hi"]
    encoding = tokenizer(texts, padding=padded, return_tensors="pt")
    sample = SearchParams(method="sample", max_new_tokens=3)
    for given in (encoding, dict(encoding)):
        with pytest.raises(InvalidRequest, match="Of an encoding that is input_ids"):
            chatty.generate(given, sample)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="of an encoding give input_ids"):
            chatty.generate([given], sample)  # type: ignore[list-item]
    for given in (encoding["input_ids"], encoding["input_ids"].numpy()):
        with pytest.raises(InvalidRequest, match=r"2 dimensions.*without padding"):
            chatty.generate(given, sample)
        with pytest.raises(InvalidRequest, match="each is a prompt, without its padding"):
            chatty.generate([given], sample)
    with pytest.raises(InvalidRequest, match="a message goes into a list"):
        chatty.generate(["Hi", MESSAGES[0]], sample)  # type: ignore[list-item]


@pytest.mark.parametrize("given", [torch.tensor([0.5, 1]), np.array([1.0]), torch.tensor(3)])
def test_numbers_that_are_no_ids_are_refused(given: Any) -> None:
    with pytest.raises((InvalidRequest, TypeError)):
        engine().generate([given], SHORT)


def test_arrays_of_texts_are_texts(chatty: Engine) -> None:
    sample = SearchParams(method="sample", max_new_tokens=3)
    arrays = chatty.generate(np.array(["Hi", "Ho"]), sample)  # type: ignore[arg-type]
    assert [r.text for r in arrays] == [r.text for r in chatty.generate(["Hi", "Ho"], sample)]


def test_a_model_of_peft_is_refused_with_the_way_out() -> None:
    peft = pytest.importorskip("peft")
    tiny: Any = copy.deepcopy(tiny_model("llama"))  # peft changes it in place
    wrapped = peft.get_peft_model(tiny, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(InvalidRequest, match=r"a model is PeftModel; .*merge_and_unload\(\)"):
        Engine(wrapped, device="cpu", kv_cache_tokens=256)


# --- bars


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_loading_draws_no_bars_unless_somebody_listens(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if kind == "gguf":
        needs_gguf()
        source = write_gguf(tmp_path / "model.gguf", gguf_llama())
    else:
        source = save_tiny(tmp_path / "model")
    capfd.readouterr()
    load_model(source, torch.device("cpu"), "auto")
    assert capfd.readouterr().err == ""
    log = logging.getLogger("w2s_fast.models")
    log.setLevel(logging.INFO)
    try:
        load_model(source, torch.device("cpu"), "auto")
    finally:
        log.setLevel(logging.NOTSET)
    assert "it/s" in capfd.readouterr().err
