"""Requests in C++ beside their models, over page managers of a base and one guide."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from tests.csrc.beams_model import ModelBeam, ModelRequest
from w2s_fast import SearchParams
from w2s_fast._pages import (
    PageManager,
    ScoringLayout,
    begin_rounds,
    end_rounds,
    fork_beams,
    held_slots,
    keep_all,
    lay_out_rows,
    lay_out_sources,
    release_finished,
    round_rows,
    take_scores,
    take_selected,
    take_tokens,
    tokens_left,
)
from w2s_fast.attention import Columns, Level, RowTree
from w2s_fast.decoding import Draws
from w2s_fast.kernels.score_select import ScoreSelection, packed_words
from w2s_fast.search import Beam, Request

EOS = {0}
# A request's number, a beam of it, and how many tokens of its prompt stand in the KV.
Row = tuple[int, ModelBeam, int]
PAGE = 4


def seen(beam: Beam) -> tuple[Any, ...]:
    return (
        beam.parent,
        beam.tokens,
        beam.logprobs,
        beam.token_scores,
        beam.total,
        beam.extra,
        beam.finish_reason,
    )


def scoring(requests: Any, drawing: Any, steps: int) -> Any:
    """Counts, rows of every model, the columns by name, and the two bounds."""
    layout = ScoringLayout(requests, drawing, steps, [1.0, -0.5])
    made = Columns(layout.columns)
    buffer = torch.zeros(made.nbytes, dtype=torch.uint8)
    layout.write(buffer.numpy(), made.offsets, made.items, layout.num_drawn, [])
    columns = {name: column.numpy() for name, column in made.cut(buffer).items()}
    assert not (made.offsets % 16).any()
    assert columns["weights"].tolist() == [1.0, -0.5]
    *_, max_candidates, max_width = layout.sizes
    return layout.counts, layout.rows, columns, max_candidates, max_width


def take(requests: Any, tokens: Any, logprobs: Any) -> Any:
    """take_tokens of tokens and log-probs [rows, steps], as a device would have drawn them."""
    rows, steps = tokens.shape
    drawn = Draws(
        torch.zeros(steps, Draws.bytes_a_step(rows + 2), dtype=torch.uint8), rows, rows + 2
    )
    drawn.tokens.copy_(torch.from_numpy(np.array(tokens, np.int64)).T)
    drawn.logprobs.copy_(torch.from_numpy(np.array(logprobs, np.float32)).T)
    return take_tokens(requests, drawn.memory.numpy(), rows, drawn.logprobs_at)


def take_where_selected(requests: Any, drawing: Any, tokens: Any, logprobs: Any) -> Any:
    """take_selected of what was drawn for some, from a selection that was laid out for more."""
    steps = tokens.shape[1]
    layout = ScoringLayout(requests, drawing, steps, [1.0])
    laid_out = scoring(requests, drawing, steps)[2]
    targets = laid_out["targets"]
    kept, candidates, count = 3, len(layout.cu_tokens) + 1, len(targets) + 2
    words = np.zeros(packed_words(1, candidates, count, kept), np.int64)
    found = ScoreSelection.unpack(torch.from_numpy(words), 1, candidates, count, kept)
    for column, drawn, known in (
        (found.tokens, tokens, laid_out["tokens"]),
        (found.logprobs, logprobs, laid_out["logprobs"]),
    ):
        column[:-2] = torch.from_numpy(np.concatenate([drawn.T.ravel(), known])[targets])
    return take_selected(requests, drawing, layout.cu_tokens, words, kept, candidates, count, steps)


def take_scored(requests: Any, cu_tokens: Any, token_scores: Any, scores: Any, broken: Any) -> Any:
    """take_scores of a selection as score_select packs it, with room for more than there is."""
    kept, candidates, tokens = 3, len(scores) + 1, len(token_scores) + 2
    words = np.zeros(packed_words(1, candidates, tokens, kept), np.int64)
    found = ScoreSelection.unpack(torch.from_numpy(words), 1, candidates, tokens, kept)
    found.scores[:-1] = torch.from_numpy(np.array(scores, np.float64))
    found.broken[:-1] = torch.from_numpy(np.array(broken, np.int64))
    found.token_scores[:-2] = torch.from_numpy(np.array(token_scores, np.float64))
    return take_scores(requests, np.array(cu_tokens, np.int64), words, kept, candidates, tokens)


@st.composite
def some_params(draw: st.DrawFn) -> SearchParams:
    method = draw(st.sampled_from(["cbs", "cbs", "bon", "sample"]))
    width: Any = draw(st.integers(1, 4))
    successors: Any = draw(st.integers(1, 3))
    chunk_length: Any = draw(st.sampled_from([1, 2, 3, 5, 17, 20]))
    most = {"cbs": width, "bon": successors, "sample": 4}[method]
    if method == "cbs" and draw(st.booleans()):
        width = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        successors = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        chunk_length = draw(st.lists(st.sampled_from([1, 2, 17, None]), min_size=1, max_size=3))
        most = 1
    return SearchParams(
        method=method,
        beam_width=width,
        successors=successors,
        n=draw(st.integers(1, most)),
        chunk_length=chunk_length,
        max_new_tokens=draw(st.sampled_from([1, 4, 9, 40])),
        finished=draw(st.sampled_from(["hold", "replicate"])),
        score=draw(st.sampled_from(["sum", "mean"])),
        dedup=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([(), (5,)])),
        ignore_eos=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.0, 0.7])),
        top_k=draw(st.sampled_from([0, 50])),
        top_p=draw(st.sampled_from([0.9, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        seed=draw(st.integers(0, 99)),
        trace=draw(st.booleans()),
        selection="top" if method == "sample" else draw(st.sampled_from(["top", "resample"])),
    )


class World:
    """Requests in C++ and their models, over page managers of a base and one guide."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.managers = [PageManager(4000, PAGE, 400, 40) for _ in range(3)]
        self.requests: list[Request] = []
        self.models: list[ModelRequest] = []
        self.traces: list[list[Any]] = []
        for _ in range(self.draw(st.integers(1, 3))):
            params = self.draw(some_params())
            prompt = self.draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
            other = self.draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
            guides = [prompt, other] if params.uses_guides else []
            self.requests.append(Request(prompt, guides, params, eos_ids=EOS))
            self.models.append(ModelRequest(params, EOS))
            self.traces.append([])

    def beams(self, which: list[int]) -> list[Any]:
        return [self.requests[i].beams for i in which]

    def prompts(self, i: int) -> list[list[int]]:
        request = self.requests[i]
        return request.prompts

    def check(self) -> None:
        for request, model in zip(self.requests, self.models):
            beams = request.beams
            assert [seen(beam) for beam in beams.candidates] == [b.seen() for b in model.candidates]
            if beams.round > 1 or not beams.open:
                assert [seen(beam) for beam in beams.kept] == [b.seen() for b in model.kept]
            assert beams.tokens_left == min(model.left(), default=0)
            assert beams.grown == min((len(b.tokens) for b in model.growing), default=0)
            assert beams.agreed() == model.agreed
            assert beams.shared == model.shared
            if model.families:
                alive = sum(len(c) for parent, c in model.families if parent.reason is None)
                assert round_rows([beams]) == [alive]
            assert (beams.sampled, beams.scored) == (model.sampled, model.scored)
            assert beams.done == (
                not model.families
                and bool(model.kept)
                and all(b.reason is not None for b in model.kept)
            )
        for m, manager in enumerate(self.managers):
            manager.check()
            held = held_slots([request.beams for request in self.requests], m).tolist()
            used = np.flatnonzero(manager.held_pages >= 0).tolist()
            assert sorted(held) == used

    def begin(self, which: list[int]) -> None:
        for i in which:
            if not self.models[i].families:
                self.models[i].begin()
        begin_rounds(self.beams(which))
        for i in which:
            request = self.requests[i]
            if request.begins and request.beams.candidates[0].slots[0] < 0:
                (slot,) = self.managers[0].allocate(1)
                self._grow(0, [slot], [self.draw(st.integers(0, len(request.prompt) - 1))])
                request.beams.set_kept_slots(0, np.array([slot], np.int32))

    def _grow(self, m: int, slots: Any, counts: Any) -> None:
        slots, counts = np.array(slots, np.int32), np.array(counts, np.int32)
        self.managers[m].reserve(slots, counts)
        self.managers[m].extend(slots, counts)

    def expand(self, which: list[int]) -> None:
        """What the base does: sources, forks, and some tokens for every growing candidate."""
        left = tokens_left(self.beams(which))
        which = [i for i, more in zip(which, left) if more]
        if not which:
            return
        steps = self.draw(st.integers(1, min(16, *filter(None, left))))
        self._check_sources(which)
        slots, counts, *_ = lay_out_sources(self.beams(which), self.managers[0], 0)
        self._grow(0, slots, counts)
        fork_beams(self.beams(which), self.managers[0], 0)
        self._check_rows(which)
        slots, *_ = lay_out_rows(self.beams(which), 0)
        self._grow(0, slots, [steps - 1] * len(slots))
        rows = [(i, beam) for i in which for beam in self.models[i].growing]
        assert len(rows) == len(slots)
        tokens = np.array(
            [[self.draw(st.integers(0, 9)) for _ in range(steps)] for _ in rows], np.int64
        )
        logprobs = -np.arange(1, tokens.size + 1, dtype=np.float32).reshape(tokens.shape)
        self._check_scoring(which, tokens, logprobs)
        others = [i for i in range(len(self.models)) if i not in which and self._waits(i)]
        selected = sorted([*which, *others])
        if all(self._ends(i, steps) for i in which) and self.draw(st.booleans()):
            args = self.beams(selected), self.beams(which)
            assert take_where_selected(*args, tokens, logprobs) == []
        else:
            assert take(self.beams(which), tokens, logprobs) == []
        for (i, beam), new, own in zip(rows, tokens.tolist(), logprobs.tolist()):
            self.models[i].take(beam, new, own)
        paused = self._pause(which, [id(beam) for _, beam in rows])
        release_finished(self.beams(which), self.managers[0], 0)
        for i, c in paused:
            beam, slot = self.models[i].candidates[c], self.requests[i].beams.candidates[c].slots[0]
            if beam.paused:  # one token behind its text, as ever
                length = len(self.requests[i].prompt) + len(beam.tokens) - 1
                assert self.managers[0].lengths[slot] == length

    def _pause(self, which: list[int], grew: list[int]) -> list[tuple[int, int]]:
        """End some chunks behind one of their tokens, of beams with these ids that have just grown;
        requests, and their candidates."""
        found = []
        for i in which:
            beams, model = self.requests[i].beams, self.models[i]
            texts = beams.new_texts() if model.params.method == "cbs" else []
            for c, known, tokens in texts:
                beam = model.candidates[c]
                ended = beam.reason in ("eos", "stop")
                assert known == beam.inherited and tokens == beam.tokens[: len(beam.tokens) - ended]
                if id(beam) not in grew or len(tokens) == known:
                    continue
                if self.draw(st.integers(0, 3)) == 0:
                    length = self.draw(st.integers(known + 1, len(tokens)))
                    beams.pause(c, length)
                    model.pause(beam, length)
                    found.append((i, c))
        return found

    def _ends(self, i: int, steps: int) -> bool:
        """Whether the guides score it after so many tokens more."""
        return self.models[i].params.uses_guides and set(self.models[i].left()) == {steps}

    def _waits(self, i: int) -> bool:
        model = self.models[i]
        return bool(model.families) and model.params.uses_guides and not any(model.left())

    def _check_scoring(self, which: list[int], tokens: Any, logprobs: Any) -> None:
        """What would be scored if all of what is drawn counted, before the host has read it."""
        complete = [i for i in which if self._ends(i, tokens.shape[1])]
        if not complete:
            return
        counts, _, laid_out, _, _ = scoring(
            self.beams(complete), self.beams(which), tokens.shape[1]
        )
        pool = np.concatenate([tokens.T.ravel(), laid_out["tokens"]])
        probs = np.concatenate([logprobs.T.ravel(), laid_out["logprobs"]])
        rows = {}
        for i in which:
            for beam in self.models[i].growing:
                rows[id(beam)] = len(rows)
        new, own = [], []
        for i in complete:
            for parent, children in self.models[i].families:
                for beam in children if parent.reason is None else []:
                    row = rows.get(id(beam))
                    drawn = [] if row is None else tokens[row].tolist()
                    new.append(beam.tokens[beam.inherited :] + drawn)
                    drawn = [] if row is None else logprobs[row].tolist()
                    own.append(beam.logprobs[beam.inherited :] + drawn)
        assert counts.tolist() == [len(chunk) for chunk in new]
        targets = laid_out["targets"]
        assert pool[targets].tolist() == [token for chunk in new for token in chunk]
        assert probs[targets].tolist() == [logprob for chunk in own for logprob in chunk]

    def _check_sources(self, which: list[int]) -> None:
        slots, counts, children, tokens, tree = lay_out_sources(
            self.beams(which), self.managers[0], 0
        )
        lengths = self.managers[0].lengths
        rows: list[Row] = []
        expected_tokens, expected_children = [], []
        for i in which:
            model, beams, prompt = self.models[i], self.requests[i].beams, self.requests[i].prompt
            if beams.forked:
                sources = [(beam, 1) for beam in model.growing]
            else:
                sources = [(b, len(c)) for b, c in model.families if b.reason is None]
            for beam, count in sources:
                expected_children.append(count)
                held = 0 if beam.tokens else int(lengths[slots[len(expected_tokens)]])
                expected_tokens.append(beam.tokens[-1:] or prompt[held:])
                rows.append((i, beam, len(prompt) if beam.tokens else 0))
        assert counts.tolist() == [len(own) for own in expected_tokens]
        assert tokens.tolist() == [token for own in expected_tokens for token in own]
        assert children.tolist() == expected_children
        self._check_tree(tree, rows)

    def _check_rows(self, which: list[int]) -> None:
        _, columns, tree, _ = lay_out_rows(self.beams(which), 0)
        rows = [
            (i, beam, len(self.requests[i].prompt))
            for i in which
            for beam in self.models[i].growing
        ]
        indices = [
            c
            for i in which
            for c, b in enumerate(self.models[i].candidates)
            if b.reason is None and not b.paused
        ]
        assert columns[5].tolist() == indices
        assert columns[6].tolist() == [len(beam.tokens) for _, beam, _ in rows]
        for n, name in enumerate(("temperature", "top_k", "top_p", "min_p", "seed")):
            wanted = [getattr(self.models[i].params, name) for i, _, _ in rows]
            assert columns[n].tolist() == np.array(wanted, columns[n].dtype).tolist(), name
        self._check_tree(tree, rows)

    def _check_tree(self, tree: Any, rows: list[Row]) -> None:
        """Rows of a request share what all do, siblings what they inherited."""
        groups = [i for i, _, _ in rows]
        families = np.cumsum(
            [
                r == 0 or (i, beam.parent) != (rows[r - 1][0], rows[r - 1][1].parent)
                for r, (i, beam, _) in enumerate(rows)
            ]
        )
        together = [p + min(self.models[i].shared, beam.inherited) for i, beam, p in rows]
        inherited = [p + beam.inherited for _, beam, p in rows]
        expected = RowTree.of([Level(groups, together), Level(families, inherited)], len(rows))
        for ours, theirs in zip(tree, vars(expected).values(), strict=True):
            assert ours.tolist() == theirs.tolist()

    def close(self, which: list[int]) -> None:
        """What the guides and the selection do where a round is complete."""
        which = [i for i in which if self.models[i].families and not any(self.models[i].left())]
        guided = [i for i in which if self.models[i].params.uses_guides]
        if guided:
            self._score(guided)
        rest = [i for i in which if i not in guided]
        for i in rest:
            self._record(i, list(range(len(self.models[i].candidates))))
        keep_all(self.beams(rest), self.managers)

    def _score(self, which: list[int]) -> None:
        for m in (1, 2):
            for i in which:
                if self.requests[i].beams.round == 1:
                    (slot,) = self.managers[m].allocate(1)
                    self._grow(m, [slot], [len(self.prompts(i)[m]) - 1])
                    self.requests[i].beams.set_kept_slots(m, np.array([slot], np.int32))
            fork_beams(self.beams(which), self.managers[m], m)
        counts, rows, laid_out, most, width = scoring(self.beams(which), [], 0)
        pool, logprobs, targets = (laid_out[n] for n in ("tokens", "logprobs", "targets"))
        drawn = [
            (i, beam)
            for i in which
            for parent, children in self.models[i].families
            if parent.reason is None
            for beam in children
        ]
        new = [beam.tokens[beam.inherited :] for _, beam in drawn]
        assert counts.tolist() == [len(own) for own in new]
        assert pool[targets].tolist() == [token for own in new for token in own]
        own = [logprob for _, beam in drawn for logprob in beam.logprobs[beam.inherited :]]
        assert logprobs[targets].tolist() == own
        for m, (slots, tree, held) in enumerate(rows, 1):
            before = [
                beam.tokens[beam.inherited - 1] if beam.inherited else self.prompts(i)[m][-1]
                for i, beam in drawn
            ]
            expected = [t for last, own in zip(before, new) for t in (last, *own[:-1])]
            assert pool[laid_out[f"inputs{m - 1}"]].tolist() == expected
            lengths = [len(self.prompts(i)[m]) - 1 + beam.inherited for i, beam in drawn]
            assert self.managers[m].lengths[slots].tolist() == lengths == held.tolist()
            ends = [len(self.prompts(i)[m]) - 1 for i, _ in drawn]
            self._check_tree(tree, [(i, beam, end) for (i, beam), end in zip(drawn, ends)])
            self._grow(m, slots, counts)
        assert most == max(len(self.models[i].candidates) for i in which)
        assert width == max(self.models[i].width for i in which)
        self._select(which, len(targets), laid_out)

    def _select(self, which: list[int], count: int, columns: dict[str, Any]) -> None:
        names = "cu_tokens previous lengths parents siblings cu_candidates stops cu_stops width"
        cu_tokens, previous, lengths, parents, siblings, cu_candidates, stops, cu_stops, width = (
            columns[name] for name in names.split()
        )
        for name, wanted in (("mean", "score"), ("dedup", "dedup")):
            flags = [getattr(self.models[i].params, wanted) in (True, "mean") for i in which]
            assert columns[name].tolist() == flags
        candidates = [(i, beam) for i in which for beam in self.models[i].candidates]
        assert previous.tolist() == [beam.total for _, beam in candidates]
        assert lengths.tolist() == [beam.inherited for _, beam in candidates]
        assert parents.tolist() == [-1 if b.parent is None else b.parent for _, b in candidates]
        assert width.tolist() == [self.models[i].width for i in which]
        for r, i in enumerate(which):
            params = self.models[i].params
            ends = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
            assert set(stops[cu_stops[r] : cu_stops[r + 1]].tolist()) == ends
        begins = [b.tokens[: b.inherited] for _, b in candidates]
        for first, end in pairwise(cu_candidates):
            for a in range(first, end):
                for b in range(first, end):
                    assert (siblings[a] == siblings[b]) == (begins[a] == begins[b])
        scores = np.arange(count, dtype=np.float64)
        totals = previous + np.add.reduceat(np.append(scores, 0), cu_tokens[:-1]) * np.diff(
            cu_tokens
        ).astype(bool)
        sound = np.full(len(candidates), -1)
        assert take_scored(self.beams(which), cu_tokens, scores, totals, sound) == []
        for c, (i, beam) in enumerate(candidates):
            own = scores[cu_tokens[c] : cu_tokens[c + 1]].tolist()
            self.models[i].score(beam, own, float(totals[c]))
        kept = np.full((len(which), int(width.max())), -1)
        for r, i in enumerate(which):
            own = self._winners(self.models[i])
            kept[r, : len(own)] = own
            if self.models[i].params.keeps_copies:
                extras = np.arange(1.0, len(self.models[i].candidates) + 1)
                self.requests[i].beams.set_extras(extras)
                for beam, extra in zip(self.models[i].candidates, extras.tolist()):
                    beam.extra = extra
            self._record(i, own)
        before = [manager.free_pages for manager in self.managers]
        copies = end_rounds(self.beams(which), kept, self.managers)
        for manager, own, free in zip(self.managers, copies, before):
            # Losers' pages first, and one at most for each copy.
            assert manager.free_pages >= free - len(own)
            assert len({*own[:, 1].tolist()}.difference(own[:, 0].tolist())) == len(own)

    def _winners(self, model: ModelRequest) -> list[int]:
        """Some candidates, best first; each as often as may be where they are resampled."""
        count = len(model.candidates)
        if model.params.keeps_copies:
            one = st.integers(0, count - 1)
            found: list[int] = self.draw(st.lists(one, min_size=1, max_size=model.width))
            return found
        order = self.draw(st.permutations(range(count)))
        return list(order[: min(model.width, count)])

    def _record(self, i: int, winners: list[int]) -> None:
        model = self.models[i]
        self.traces[i].append(([b.seen() for b in model.candidates], list(winners)))
        model.close(list(winners))

    def interrupt(self, i: int) -> None:
        """Its round begins again, or it is set aside between two rounds; then it holds nothing."""
        beams, model = self.requests[i].beams, self.models[i]
        if model.families:
            beams.start_over(self.managers)
            model.families = []
            model.rounds -= 1
            assert beams.aside == bool(model.kept)
        else:
            beams.set_aside(self.managers)
        model.give_up()
        if not beams.aside:
            return
        alive = [b for b in model.kept if b.reason is None]
        for m, prompt in enumerate(self.prompts(i)):
            slots = self.managers[m].allocate(len(alive))
            self._grow(m, slots, [len(prompt) + len(b.tokens) - 1 for b in alive])
            beams.set_kept_slots(m, slots)
        beams.resume()
