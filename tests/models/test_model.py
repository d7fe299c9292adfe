"""PagedModel computes from pages what the model's own eager forward computes from a text."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    ElectraConfig,
    FalconH1Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    T5Config,
)

from tests.support.tiny_models import (
    FAMILIES,
    MAX_POSITIONS,
    VOCABULARY,
    WINDOW,
    draw_weights,
    tiny_model,
)
from w2s_fast.errors import OutOfPages, UnsupportedModel
from w2s_fast.models.model import PagedModel

ATOL = 1e-5


def tokens_of(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator)


def eager(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of the whole text."""
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        return model(input_ids=text[None], use_cache=False).logits[0]


def paged(family: str, page_size: int = 4, **options: object) -> PagedModel:
    model = tiny_model(family, dtype=torch.float32)
    return PagedModel(model, page_size=page_size, kv_cache_tokens=2048, max_slots=64, **options)


def append(model: PagedModel, slots: np.ndarray, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each chunk's tokens, all chunks appended in one pass."""
    counts = [len(c) for c in chunks]
    logits = model.logits(model.forward(slots, torch.cat(chunks), counts))
    return list(logits.split(counts))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=ATOL * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_equals_the_eager_forward(family: str, page_size: int) -> None:
    model = paged(family, page_size)
    text = tokens_of(WINDOW * 5 + 1)
    (logits,) = append(model, model.pool.allocate(1), [text])
    assert_close(logits, eager(model.model, text))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_token_by_token_equals_the_eager_forward(family: str) -> None:
    model = paged(family)
    texts = [tokens_of(15, seed) for seed in range(3)]
    slots = model.pool.allocate(3)
    steps = [append(model, slots, [text[t : t + 1] for text in texts]) for t in range(15)]
    for i, text in enumerate(texts):
        assert_close(torch.cat([step[i] for step in steps]), eager(model.model, text))


@pytest.mark.parametrize("family", FAMILIES)
def test_appending_several_tokens_to_many_sequences_equals_the_eager_forward(family: str) -> None:
    model = paged(family)
    rng = np.random.default_rng(0)
    texts = [tokens_of(40, seed) for seed in range(9)]
    slots = model.pool.allocate(9)
    done = [0] * 9
    seen: list[list[torch.Tensor]] = [[] for _ in texts]
    for _ in range(6):
        # Other sequences, in another order, with other counts each time.
        chosen = rng.permutation(9)[: rng.integers(1, 10)]
        counts = rng.integers(1, 7, len(chosen))
        chunks = [texts[i][done[i] : done[i] + c] for i, c in zip(chosen, counts, strict=True)]
        for i, logits in zip(chosen, append(model, slots[chosen], chunks), strict=True):
            seen[i].append(logits)
            done[i] += len(logits)
    assert sum(done) > 60
    assert model.pool.lengths(slots).tolist() == done
    for i, text in enumerate(texts):
        if done[i]:
            assert_close(torch.cat(seen[i]), eager(model.model, text[: done[i]]))


@pytest.mark.parametrize("room", [1, 4000, 100_000])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_attention_in_groups_of_any_size_equals_the_eager_forward(
    family: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2s_fast.attention.gathered._GROUP_BYTES", room)
    model = paged(family)
    texts = [tokens_of(n, n) for n in (9, 8, 3, 30, 7, 1, 12, 31, 2)]
    slots = model.pool.allocate(9)
    append(model, slots, [text[:-1] if len(text) > 1 else text for text in texts])
    grown = [i for i, text in enumerate(texts) if len(text) > 1]
    last = append(model, slots[grown], [texts[i][-1:] for i in grown])
    for ours, i in zip(last, grown, strict=True):
        assert_close(ours, eager(model.model, texts[i])[-1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_very_different_lengths_in_one_pass_equal_the_eager_forward(family: str) -> None:
    model = paged(family)
    texts = [tokens_of(n, n) for n in (1, 90, 2, 17, 1, 33, 120)]
    logits = append(model, model.pool.allocate(7), texts)
    for ours, text in zip(logits, texts, strict=True):
        assert_close(ours, eager(model.model, text))
    # And with long histories: one token for some, many for others.
    slots = model.pool.allocate(4)
    past = [tokens_of(n, 50 + n) for n in (3, 100, 60, 1)]
    new = [tokens_of(n, 90 + n) for n in (1, 1, 12, 25)]
    append(model, slots, past)
    for ours, a, b in zip(append(model, slots, new), past, new, strict=True):
        assert_close(ours, eager(model.model, torch.cat([a, b]))[len(a) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_forked_sequences_go_their_own_ways(family: str) -> None:
    model = paged(family)
    prompt = tokens_of(WINDOW * 2 + 2)
    parent = model.pool.allocate(1)
    append(model, parent, [prompt])
    children = model.pool.fork(parent, [3])
    chunks = [tokens_of(n, 7 + n) for n in (5, 2, 9)]
    for ours, chunk in zip(append(model, children, chunks), chunks, strict=True):
        assert_close(ours, eager(model.model, torch.cat([prompt, chunk]))[len(prompt) :])
    grandchildren = model.pool.fork(children, [1, 0, 2])
    model.pool.release(children[:1])
    more = [tokens_of(3, seed) for seed in range(3)]
    texts = [torch.cat([prompt, chunks[i]]) for i in (0, 2, 2)]
    for ours, text, chunk in zip(append(model, grandchildren, more), texts, more, strict=True):
        assert_close(ours, eager(model.model, torch.cat([text, chunk]))[len(text) :])
    # The parent has not noticed.
    last = tokens_of(4, 99)
    (ours,) = append(model, parent, [last])
    assert_close(ours, eager(model.model, torch.cat([prompt, last]))[len(prompt) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_truncated_sequence_goes_on_from_where_it_was_cut(family: str) -> None:
    model = paged(family)
    text = tokens_of(14)
    slots = model.pool.allocate(2)
    append(model, slots, [text, text])
    fork = model.pool.fork(slots[:1], [1])
    cuts = [6, 13, 9]
    every = np.concatenate([slots, fork])
    model.pool.truncate(every, cuts)
    chunks = [tokens_of(6, 30 + i) for i in range(3)]
    for ours, cut, chunk in zip(append(model, every, chunks), cuts, chunks, strict=True):
        assert_close(ours, eager(model.model, torch.cat([text[:cut], chunk]))[cut:])


def test_pages_left_by_others_are_never_read() -> None:
    model = paged("llama")
    model.pool.kv.fill_(math.nan)
    text = tokens_of(11)
    slots = model.pool.allocate(3)
    logits = append(model, slots, [text, text[:3], text[:1]])
    for ours, n in zip(logits, (11, 3, 1), strict=True):
        assert_close(ours, eager(model.model, text[:n]))


@pytest.mark.parametrize("family", FAMILIES)
def test_token_logprobs_are_the_log_softmax_of_the_logits(family: str) -> None:
    model = paged(family)
    text = tokens_of(20)
    hidden = model.forward(model.pool.allocate(1), text, [20])
    targets = tokens_of(20, 5) % 17
    expected = eager(model.model, text).double()
    rows = torch.arange(20)
    got = model.token_partials(hidden, targets).logprobs()
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), expected.log_softmax(-1)[rows, targets], atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        model.token_partials(hidden, targets, 17).logprobs().double(),
        expected[:, :17].log_softmax(-1)[rows, targets],
        atol=2e-5,
        rtol=0,
    )


def test_the_model_stays_usable_by_itself() -> None:
    model = tiny_model("llama", dtype=torch.float32, instance="left alone")
    text = tokens_of(9)
    before = eager(model, text)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(text[None], **greedy)
    served = PagedModel(model, kv_cache_tokens=256)
    served.forward(served.pool.allocate(1), text, [9])
    assert model.config._attn_implementation == "eager"
    assert torch.equal(eager(model, text), before)
    assert torch.equal(model.generate(text[None], **greedy), generated)


def test_two_paged_models_share_nothing() -> None:
    first, second = paged("llama"), paged("llama")
    text = tokens_of(8)
    a, b = first.pool.allocate(1), second.pool.allocate(1)
    append(first, a, [text[:4]])
    append(second, b, [text[4:]])
    (ours,) = append(first, a, [text[4:]])
    assert_close(ours, eager(first.model, text)[4:])


def test_too_few_pages_append_nothing_and_the_slot_goes_on() -> None:
    model = PagedModel(
        tiny_model("gpt2", dtype=torch.float32), page_size=4, kv_cache_tokens=32, max_slots=8
    )
    text = tokens_of(24)
    slots = model.pool.allocate(2)
    append(model, slots, [text[:8], text[:20]])
    free = model.pool.free_pages
    with pytest.raises(OutOfPages):
        model.forward(slots, tokens_of(10), [5, 5])
    assert model.pool.free_pages == free
    assert model.pool.lengths(slots).tolist() == [8, 20]
    (ours,) = append(model, slots[1:], [text[20:]])
    assert_close(ours, eager(model.model, text)[20:])


def test_what_a_model_says_of_itself_is_known() -> None:
    model = paged("gemma2")
    assert model.vocab_size == VOCABULARY
    assert model.max_positions == MAX_POSITIONS
    layers, two, _, page_size, heads, dim = model.pool.kv.shape
    assert (layers, two, page_size, heads, dim) == (2, 2, 4, 2, 8)
    assert model.pool.free_pages == model.pool.num_pages  # the probes gave their pages back
    assert model.pool.free_slots == 64


UNSUPPORTED: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2),
    "gptj": GPTJConfig(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
    "mamba": MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_model_that_cannot_be_served_is_refused_by_name_with_the_reason(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(UNSUPPORTED[kind])
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel) as caught:
        PagedModel(model, "untuned guide", kv_cache_tokens=256)
    message = str(caught.value)
    assert "untuned guide" in message
    assert type(model).__name__ in message
    assert len(message.split("cannot be served:")[1]) > 10
    assert model.config._attn_implementation == before


def test_a_head_of_several_layers_is_refused_whatever_it_raises() -> None:
    for width in (16, 8):
        config = ElectraConfig(
            vocab_size=32, embedding_size=width, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=16, is_decoder=True,
        )  # fmt: skip
        with pytest.raises(UnsupportedModel, match=r"base: ElectraForCausalLM .* cannot be served"):
            PagedModel(AutoModelForCausalLM.from_config(config), kv_cache_tokens=256)


def with_a_bias(family: str, values: dict[int, float]) -> PreTrainedModel:
    """A model that adds these values to some of its logits."""
    model = copy.deepcopy(tiny_model(family, dtype=torch.float32))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    for token, value in values.items():
        model.lm_head.bias.data[token] = value
    return model


@pytest.mark.parametrize("value", [-math.inf, -3e38])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_huge_logit_neither_hides_a_wrong_model_nor_refuses_a_right_one(
    family: str, value: float
) -> None:
    served = PagedModel(with_a_bias(family, {3: value}), kv_cache_tokens=256, page_size=4)
    if family == "gemma2":  # it caps its logits
        value = -6.0
    (logits,) = append(served, served.pool.allocate(1), [tokens_of(9)])
    assert float(logits[0, 3]) == pytest.approx(value)
    right = served.head.logits
    served.head.logits = lambda hidden, _own: right(hidden) + 1.0  # the huge one stays what it is
    with pytest.raises(UnsupportedModel, match="differ from its own eager forward"):
        served.compare_with_eager()


def test_infinities_must_stand_in_the_same_places() -> None:
    served = PagedModel(with_a_bias("llama", {3: -math.inf, 5: math.inf}), kv_cache_tokens=256)
    right = served.head.logits
    for wrong in ({"neginf": 0.0, "posinf": math.inf}, {"neginf": -math.inf, "posinf": 0.0}):
        served.head.logits = lambda hidden, _own, wrong=wrong: right(hidden).nan_to_num(**wrong)
        with pytest.raises(UnsupportedModel, match="differ from its own eager forward"):
            served.compare_with_eager()


def test_an_encoder_decoder_model_is_refused_as_one() -> None:
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(UnsupportedModel, match=r"T5.*encoder-decoder"):
        PagedModel(model, kv_cache_tokens=256)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "sliding_window": 8}
# Models with a way of their own to depend on what stands far back, or on what else runs.
TRICKY: dict[str, PreTrainedConfig] = {
    "a window that only the mask knows (phimoe)": PhimoeConfig(
        **SMALL, **EXPERTS, num_local_experts=4
    ),
    "a window that only the mask knows (qwen2_moe)": Qwen2MoeConfig(
        **SMALL, **EXPERTS, num_experts=4, use_sliding_window=True, max_window_layers=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "rope frequencies that follow the longest text of a pass (longrope)": Phi3Config(
        **SMALL,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.0],
            "long_factor": [2.0, 4.0],
        },
    ),
    "rope frequencies that follow the longest text so far (dynamic)": LlamaConfig(
        **{**SMALL, "max_position_embeddings": 24},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "a state space beside every attention (falcon_h1)": FalconH1Config(
        **SMALL, head_dim=8, mamba_d_ssm=16, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=8
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRICKY)
def test_what_is_served_is_right_at_every_length_alone_and_beside_others(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(TRICKY[kind], attn_implementation="eager").eval()
    draw_weights(model, seed=0, peak=2.0)
    try:
        served = PagedModel(model, kv_cache_tokens=256, page_size=4)
    except UnsupportedModel:
        return  # a refusal is as good
    assert served.max_positions is not None
    long, short = tokens_of(served.max_positions), tokens_of(5)
    slots = served.pool.allocate(2)
    both = append(served, slots, [long[:-1], short])
    assert_close(both[0], eager(model, long[:-1]))
    assert_close(both[1], eager(model, short))
    (last,) = append(served, slots[:1], [long[-1:]])
    assert_close(last, eager(model, long)[-1:])
    (alone,) = append(served, served.pool.allocate(1), [short])
    assert_close(alone, eager(model, short))
