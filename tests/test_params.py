"""SearchParams refuses every bad value by name, and says what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from w2s_fast.errors import InvalidRequest, W2SFastError
from w2s_fast.params import SearchParams

INTEGER = "an integer >= 1"
BAD: list[tuple[str, Any, str]] = [
    *((name, value, INTEGER) for name in ("beam_width", "successors", "max_new_tokens", "n")
      for value in (0, -1, 1.0, 2.5, "4", None, True, False, math.nan)),
    *(("chunk_length", value, INTEGER) for value in (0, -5, 1.0, "5", True, math.inf)),
    *((name, value, "at least one") for name in ("beam_width", "successors", "chunk_length")
      for value in ([], ())),
    *(("top_k", value, "an integer >= 0") for value in (-1, 1.5, "50", None, True)),
    *(("temperature", value, "a number >= 0")
      for value in (-0.1, -1, math.nan, math.inf, -math.inf, "0.7", None, True)),
    *(("top_p", value, "in (0, 1]") for value in (0, 0.0, -0.5, 1.0001, 2, math.nan, "1", None,
                                                   True)),
    *(("min_p", value, "in [0, 1]") for value in (-0.1, 1.1, math.nan, "0", None, False)),
    *(("seed", value, "an integer >= 0") for value in (-1, 2**64, 0.0, "0", None, True)),
    *(("method", value, "'cbs', 'bon', 'sample'") for value in ("CBS", "greedy", "", None, 1)),
    *(("finished", value, "'hold', 'replicate'") for value in ("drop", "", None, True)),
    *(("score", value, "'sum', 'mean'") for value in ("max", "", None, 0)),
    *((name, value, "True or False") for name in ("ignore_eos", "trace", "dedup")
      for value in (0, 1, "yes", None)),
    *(("length_penalty", value, "a finite number") for value in (math.nan, math.inf, "1", None,
                                                                 True)),
    *(("early_stopping", value, "True, False or 'never'") for value in ("always", 1, None)),
    *(("stop_token_ids", value, "an integer >= 0") for value in ([-1], [1, 2.0], ["a"], [True],
                                                                 [None])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda x: repr(x)[:24])
def test_a_bad_value_is_refused_by_name_with_what_is_allowed(
    name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SearchParams(**{name: value})
    message = str(caught.value)
    assert name in message
    shown = value[-1] if name == "stop_token_ids" else value
    assert repr(shown) in message
    assert allowed in message


@pytest.mark.parametrize("value", [[0], [4, 0, 2], (1, -1), [2, 1.5], ["4"], [True], [[4]]])
@pytest.mark.parametrize("name", ["beam_width", "successors", "chunk_length"])
def test_a_bad_entry_of_a_sequence_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=INTEGER) as caught:
        SearchParams(**{name: value})
    assert name in str(caught.value)


def test_no_width_is_none() -> None:
    for name in ("beam_width", "successors"):
        with pytest.raises(InvalidRequest, match=name):
            SearchParams(**{name: [2, None]})


def test_one_number_where_there_is_one_round() -> None:
    for values in ({"method": "bon", "successors": [4, 2]}, {"method": "beam", "beam_width": [4]}):
        with pytest.raises(InvalidRequest, match="one number for method"):
            SearchParams(**values)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
@pytest.mark.parametrize("value", [None, 5, iter([]), iter([7])], ids=["None", "5", "i0", "i7"])
def test_what_is_not_a_sequence_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        SearchParams(**{name: value})


@pytest.mark.parametrize("value", [["cbs"], {"a": 1}])
@pytest.mark.parametrize("name", ["method", "finished", "score"])
def test_an_unhashable_choice_is_refused_like_any_other(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        SearchParams(**{name: value})


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"method": "cbs", "beam_width": 2, "n": 3}, "beam_width (2)"),
        ({"method": "cbs", "beam_width": 2, "successors": 9, "n": 9}, "beam_width (2)"),
        ({"method": "beam", "beam_width": 2, "successors": 9, "n": 3}, "beam_width (2)"),
        ({"method": "bon", "successors": 4, "n": 5}, "successors (4)"),
        ({"method": "bon", "beam_width": 9, "successors": 4, "n": 9}, "successors (4)"),
        ({"beam_width": [4, 2], "n": 3}, "beam_width of the last round (2)"),
        # Three rounds: the fourth entry is nobody's.
        ({"beam_width": [1, 2, 3, 4], "max_new_tokens": 15, "n": 4}, "of the last round (3)"),
        # No more than there are candidates.
        ({"beam_width": [1, 9], "successors": 2, "max_new_tokens": 10, "n": 3}, "round (2)"),
        ({"beam_width": [2, 9], "successors": 1, "n": 3}, "round (2)"),
    ],
)
def test_no_more_hypotheses_can_be_asked_for_than_are_kept(
    values: dict[str, Any], limit: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SearchParams(**values)
    assert f"n is {values['n']}" in str(caught.value)
    assert limit in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.0, "top_p": 1e-12},
        {"top_p": 1, "min_p": 1, "top_k": 0},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"chunk_length": None},
        {"chunk_length": 10**9, "max_new_tokens": 1},
        {"beam_width": 1, "successors": 1},
        {"method": "sample", "n": 100, "beam_width": 1, "successors": 1},
        {"method": "bon", "n": 16, "successors": 16, "beam_width": 1},
        {"stop_token_ids": [1, 2, 3]},
        {"stop_token_ids": ()},
        {"stop": []},
        {"stop": ["a"] * 64},
        {"stop": ["x" * 1024]},
        {"min_new_tokens": 50},
    ],
    ids=str,
)
def test_every_value_at_the_edge_of_what_is_allowed_is_taken(values: dict[str, Any]) -> None:
    params = SearchParams(**values)
    for name, value in values.items():
        got = getattr(params, name)
        assert got == tuple(value) if name.startswith("stop") else got == value


def test_params_cannot_change_once_they_were_checked() -> None:
    ids = [1, 2]
    params = SearchParams(stop_token_ids=ids)
    ids.append(-1)
    assert params.stop_token_ids == (1, 2)
    widths = [3, 2]
    assert SearchParams(beam_width=widths).beam_width == (3, 2)
    with pytest.raises(AttributeError):
        params.beam_width = 0  # type: ignore[misc]
    hash(params)  # a request's parameters can be a key


def test_the_rounds_follow_from_the_widths() -> None:
    params = SearchParams(
        beam_width=[8, 4, 1], successors=[2, 1, 3], chunk_length=[5, 2], max_new_tokens=14
    )
    shapes = list(params.widths.shapes())
    assert [(s.hypotheses, s.rows, s.kept, s.before, s.chunk) for s in shapes] == [
        (1, 16, 8, 0, 5),
        (8, 8, 4, 5, 2),
        (4, 12, 1, 7, 2),
        (1, 3, 1, 9, 2),
    ]
    assert [s.repeats for s in shapes] == [False, False, False, True]
    assert params.rows == 16
    short = SearchParams(beam_width=[8, 4, 1], chunk_length=9, max_new_tokens=10)
    assert [(s.rows, s.before, s.chunk) for s in short.widths.shapes()] == [(32, 0, 9), (32, 9, 1)]
    # However many rounds there are.
    assert len(list(SearchParams(chunk_length=1, max_new_tokens=10**9).widths.shapes())) == 2


def test_a_refusal_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match="beam_width"):
        SearchParams(beam_width=0)
    assert issubclass(InvalidRequest, W2SFastError)


@pytest.mark.parametrize(
    ("values", "first", "kept", "per_round", "guided"),
    [
        ({}, 16, 4, 5, True),
        ({"beam_width": 2, "successors": 3, "chunk_length": None}, 6, 2, 50, True),
        ({"chunk_length": 80}, 16, 4, 50, True),
        ({"beam_width": 1, "successors": 1}, 1, 1, 5, False),
        ({"beam_width": 1, "successors": 2}, 2, 1, 5, True),
        ({"beam_width": 2, "successors": 1}, 2, 2, 5, True),
        ({"method": "bon", "successors": 16}, 16, 1, 50, True),
        ({"method": "bon", "successors": 16, "n": 3}, 16, 3, 50, True),
        ({"method": "sample", "n": 3}, 3, 3, 50, False),
        ({"beam_width": [8, 4, 2], "successors": [2, 1], "chunk_length": [7, 3]}, 16, 8, 7, True),
        ({"beam_width": [1, 2], "successors": [1, 3], "chunk_length": [7, None]}, 1, 2, 50, True),
        # The second round never comes.
        ({"beam_width": 1, "successors": [1, 3], "chunk_length": None}, 1, 1, 50, False),
    ],
    ids=str,
)
def test_the_shape_of_a_round_follows_from_the_method(
    values: dict[str, Any], first: int, kept: int, per_round: int, guided: bool
) -> None:
    params = SearchParams(**values)
    assert params.first_candidates == first
    assert params.kept == kept
    assert params.tokens_per_round == per_round
    assert params.uses_guides == guided
