"""The methods that are compared, and the files that evaluations read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from w2s_fast import SearchParams
from w2s_fast.errors import InvalidRequest
from w2s_fast.evaluate import (
    Instruction,
    alpaca_method,
    comparison_methods,
    read_instructions,
    read_posts,
    read_prompts,
)

COMMON = SearchParams(max_new_tokens=20, temperature=0.9, top_k=10)


def test_every_search_of_a_comparison_has_16_candidates_and_the_same_sampling() -> None:
    methods = comparison_methods(COMMON, [0.5, 1.0])
    names = [method.name for method in methods]
    assert names[:2] == ["base", "best-of-16"]
    assert len(set(names)) == len(names) == 11
    for method in methods:
        params = method.params
        assert (params.temperature, params.top_k, params.max_new_tokens) == (0.9, 10, 20)
        if params.method in ("cbs", "bon"):
            assert params.first_candidates == 16
        if params.method == "cbs":
            assert params.chunk_length == 5


def test_the_short_comparison_is_base_best_of_n_eft_and_the_search() -> None:
    names = [method.name for method in comparison_methods(COMMON, [1.0], short=True)]
    assert names == ["base", "best-of-16", "EFT beta=1", "CBS W=4 K=4"]


def test_alpaca_has_the_papers_widths() -> None:
    params = alpaca_method(COMMON).params
    assert (params.beam_width, params.successors, params.chunk_length) == (2, 2, 30)


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The film\n\nA book \n")
    assert read_prompts(tmp_path / "a.txt") == ["The film", "A book "]
    (tmp_path / "a.jsonl").write_text('{"prompt": "The film"}\n\n{"prompt": "x", "id": 1}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["The film", "x"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\u2028line\x85"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == ["one\u2028line\x85"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"The film\n\xff\xfe")
    with pytest.raises(InvalidRequest, match=rf"{name} is not UTF-8"):
        read_prompts(tmp_path / name)


def test_posts_stand_in_the_template_and_prompts_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"post": "braces {post}"}\n{"prompt": "p TL;DR:"}\n')
    assert read_posts(tmp_path / "a.jsonl", "<{post}>") == ["<braces {post}>", "p TL;DR:"]
    with pytest.raises(InvalidRequest, match=r"\{post\} in it"):
        read_posts(tmp_path / "a.jsonl", "no place")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no lines"),
        ('{"prompt": "a"}\n{"prompt": ""}', "line 2: 'prompt' must be a text"),
        ('{"prompt": "a"}\n\n{"prompt": 3}', "line 3: 'prompt' must be a text"),
        ("[1]", "line 1: allowed: an object"),
        ("{", "line 1: no JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InvalidRequest, match=said):
        read_prompts(tmp_path / "a.jsonl")


def test_instructions_are_read_as_alpaca_eval_writes_them(tmp_path: Path) -> None:
    rows = [{"instruction": "Say hi", "dataset": "helpful_base"}, {"instruction": "Add"}]
    path = tmp_path / "set.json"
    path.write_text(json.dumps(rows))
    assert read_instructions(path) == [Instruction("Say hi", "helpful_base"), Instruction("Add")]
    for bad in ("{}", "[]", "[{}]", '[{"instruction": " "}]', "["):
        path.write_text(bad)
        with pytest.raises(InvalidRequest, match=r"set\.json"):
            read_instructions(path)
