"""What a search takes at least: the formulas give the numbers that were worked out by hand."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from bench import random_models as shapes
from bench.roofline import (
    Limits,
    Load,
    Weights,
    chunks,
    decode_seconds,
    product_seconds,
    score_seconds,
)

H200 = Limits(bandwidth=4.3e12, rate=790e12)
GPT2 = Weights(123_653_376, 36_864)
GPT2_XL = Weights(1_555_972_800, 307_200)
EIGHT = Weights(7_504_924_672, 131_072)
SEVEN = Weights(7_113_805_824, 131_072)  # of a vocabulary of 32,768


# (base, guide, requests, chunk): ms a chunk decoding, the same without sharing, scoring, the whole.
@pytest.mark.parametrize(
    ("base", "guide", "requests", "chunk", "decode", "flat", "score", "whole_s"),
    [
        (GPT2_XL, GPT2, 1, 5, 4.15, 7.96, 0.14, 0.445),
        (GPT2_XL, GPT2, 64, 5, 55.5, 299, 4.96, 6.37),
        (EIGHT, SEVEN, 1, 5, 17.6, 19.2, 6.71, 2.53),
        (EIGHT, SEVEN, 1, 30, 101, 110, 16.8, 2.15),
        (EIGHT, SEVEN, 64, 30, 648, 1235, 1056, 32.5),
    ],
)
def test_a_search_of_512_tokens_behind_512(
    base: Weights,
    guide: Weights,
    requests: int,
    chunk: int,
    decode: float,
    flat: float,
    score: float,
    whole_s: float,
) -> None:
    own = Load(requests, prompt=512)
    loads = [(history, replace(own, chunk=new)) for history, new in chunks(chunk, 512)]
    decoding = [decode_seconds(base, load, history, H200) for history, load in loads]
    alone = [decode_seconds(base, load, history, H200, shared=False) for history, load in loads]
    scoring = [score_seconds([guide, guide], load, history, H200) for history, load in loads]
    prompts = sum(product_seconds(model, 512 * requests, H200) for model in (base, guide, guide))
    # Of 0.14 the last digit is worth 7 %.
    assert 1e3 * statistics.mean(decoding) == pytest.approx(decode, rel=6e-3)
    assert 1e3 * statistics.mean(alone) == pytest.approx(flat, rel=6e-3)
    assert 1e3 * statistics.mean(scoring) == pytest.approx(score, rel=0.04 if score < 1 else 6e-3)
    assert sum(decoding) + sum(scoring) + prompts == pytest.approx(whole_s, rel=6e-3)


def test_chunks_end_where_the_response_does() -> None:
    assert list(chunks(30, 70)) == [(0, 30), (30, 30), (60, 10)]
    assert list(chunks(5, 10)) == [(0, 5), (5, 5)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (shapes.GPT2, replace(GPT2, item_bytes=2)),
        (shapes.GPT2_XL, GPT2_XL),
        (shapes.LARGE, EIGHT),
    ],
)
def test_weights_of_a_model_are_those_that_tokens_are_multiplied_with(
    config: shapes.PreTrainedConfig, expected: Weights
) -> None:
    model = shapes.make(config, 0, torch.device("meta"), torch.bfloat16)
    assert Weights.of(model) == expected


def test_keys_of_fewer_heads_and_of_a_head_size_of_their_own_are_counted_as_they_are() -> None:
    config = shapes.qwen3(3, 32, 4, 2, 24, 48, 97)
    model = shapes.make(config, 0, torch.device("cpu"), torch.float32)
    assert Weights.of(model).kv_bytes == 2 * 3 * 2 * 24 * 4
