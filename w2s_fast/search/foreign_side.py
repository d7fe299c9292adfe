"""The foreign guides' side of the search: whole texts are scored, and only what is new is run.

What a candidate says may change tokens that its parent ended with. So its slot is rolled back to
the tokens that both have in common, and what comes behind is run; log-probs of the others stay.
That gives what the whole text would, run from the beginning.

Pages are taken when a round is scored, and nobody is promised any: how many tokens a text has here,
nobody knows before it is drawn. Where they are missing, other requests' slots are given up, and
their texts are run again when they come back. So a foreign guide holds nothing that it could not do
without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import Beam
from w2s_fast.attention import Reading, brought
from w2s_fast.cache import PagePool, as_int32
from w2s_fast.decoding import Lane
from w2s_fast.errors import EngineFailure, InvalidRequest, NumericalError, OutOfPages, W2SFastError
from w2s_fast.models import Groups, PagedModel
from w2s_fast.search.beginnings import advance, prefill
from w2s_fast.search.foreign_guide import ForeignGuides, Grown, Said, Text
from w2s_fast.search.guide import two_at_a_time
from w2s_fast.search.request import Request

_NO_SLOT = -1


@dataclass(eq=False)
class _Version:
    """A response in one model.

    Attributes:
        text: its tokens, without an EOS.
        logprobs: float64, of each of its tokens; of those before the response anything.
        total: their sum over the response, EOS included.
        slot: holds all tokens but the last; none where the response has ended, or does not stand.
    """

    text: Text
    logprobs: NDArray[np.float64]
    total: float = 0.0
    slot: int = _NO_SLOT


@dataclass(eq=False)
class _Reading:
    """A beam as the foreign guides have it: what it says, in words and in each model's tokens."""

    said: Said
    versions: list[_Version]
    ended: bool = False


@dataclass(eq=False)
class _Readings:
    """All beams of a request; those kept, and the candidates, in its own order of them."""

    root: _Reading
    kept: list[_Reading]
    candidates: list[_Reading]

    def parent_of(self, beam: Beam) -> _Reading:
        return self.root if beam.parent is None else self.kept[beam.parent]

    def parents(self, number: int) -> list[_Reading]:
        """What candidates of a round go on from, by its number."""
        if number == 1:
            return [self.root]
        return list({id(own): own for own in self.kept if not own.ended}.values())

    def slots(self, model: int) -> set[int]:
        """Those held in one model."""
        every = chain([self.root], self.kept, self.candidates)
        return {reading.versions[model].slot for reading in every} - {_NO_SLOT}


class _Row:
    """A candidate that has got tokens, and what it goes on from."""

    def __init__(
        self, request: Request, beam: Beam, parent: _Reading, silent_ids: Collection[int]
    ) -> None:
        """``silent_ids``: tokens that no text shows; one that ends a response is an EOS."""
        self.request, self.parent = request, parent
        self.ends = beam.finish_reason is not None
        self.tokens = beam.tokens
        stopped = beam.finish_reason == "stop" and beam.ending is None
        self.eos = beam.finish_reason == "eos" or (stopped and self.tokens[-1] in silent_ids)
        if self.eos:
            self.tokens = self.tokens[:-1]
        self.reading = _Reading(parent.said, list(parent.versions), self.ends)


class _Run:
    """A version that is made from its parent's by running what it has for itself.

    Attributes:
        common: tokens that both have. targets: those that are scored; ``inputs`` are run for them.
    """

    def __init__(self, row: _Row, parent: _Version, grown: Grown, eos: int | None) -> None:
        self.request, self.parent = row.request, parent
        self.child = _Version(grown.text, parent.logprobs)
        self.ends = row.ends
        ids = grown.text.ids
        # The log-prob of a token comes from the one before it; the first one of all has none.
        self.common = max(1, grown.common)
        self.targets = ids[self.common :].tolist()
        if row.eos and eos is not None:
            self.targets.append(eos)
        self.inputs = ids[self.common - 1 : self.common - 1 + len(self.targets)].tolist()

    def take(self, logprobs: NDArray[np.float64]) -> int | None:
        """Take over the targets' log-probs; where in the response the first broken one is."""
        text = self.child.text
        known = self.parent.logprobs[: self.common]
        missing = np.zeros(self.common - len(known))  # of the prompt
        every = np.concatenate([known, missing, logprobs])
        own = every[text.start :]
        self.child.total = float(own.sum())
        self.child.logprobs = every[: len(text.ids)]
        return None if np.isfinite(own).all() else int(np.argmin(np.isfinite(own)))


class ForeignSide:
    """Scores what candidates say in guides of other vocabularies.

    Attributes:
        models: of these guides, each once.
        run_tokens: tokens of responses that each of them has run, all together.
    """

    def __init__(
        self,
        foreign: ForeignGuides | None,
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``agree``: what is done to what the choice of candidates follows from; see
        :meth:`PagedModel.agree`."""
        self._agree = agree
        self._foreign = foreign
        guides = [] if foreign is None else foreign.guides
        self.models: list[PagedModel] = [] if foreign is None else list(foreign.translators)
        self._translators = [] if foreign is None else list(foreign.translators.values())
        self.run_tokens = [0] * len(self.models)
        self._roles = [[self.models.index(m) for m in own.guide.models] for own in guides]
        of = {model: own for own in reversed(guides) for model in own.guide.models}
        self._eos = [of[model].eos_token_id for model in self.models]
        self._vocab_sizes = [of[model].guide.vocab_size for model in self.models]
        self._groups = Groups(self.models)
        self._lane = Lane(*(model.device for model in self.models))
        self._of: dict[Request, _Readings] = {}

    def enter(self, requests: Sequence[Request]) -> set[Request]:
        """Run texts that these requests' candidates go on from, a pass at most in each model.

        Returns:
            Those whose texts do not all stand yet: their rounds wait.
        """
        waiting: set[Request] = set()
        order = sorted(requests, key=lambda request: request.urgency)
        parents = [
            (request, reading)
            for request in order
            for reading in self._readings_of(request).parents(request.beams.round)
        ]
        try:
            for m, model in enumerate(self.models):
                missing = [
                    (request, reading.versions[m])
                    for request, reading in parents
                    if not _stands(model, reading.versions[m])
                ]
                new = [version for _, version in missing if version.slot == _NO_SLOT]
                for version, slot in zip(new, model.pool.allocate(len(new)).tolist()):
                    version.slot = slot
                found = advance(
                    model,
                    as_int32([version.slot for _, version in missing]),
                    [version.text.ids[:-1] for _, version in missing],
                    model.max_pass_tokens,
                )
                waiting.update(
                    request for (request, _), ready in zip(missing, found.ready) if not ready
                )
        except OutOfPages:  # whoever scores makes room for what it needs
            for own in self._of.values():
                self._evict(own)
            self._release_unknown()
            return set()
        return waiting

    def score(
        self, requests: Sequence[Request], candidates: Sequence[Sequence[Beam]]
    ) -> list[NDArray[np.float64]]:
        """What these guides say of all candidates of each request, weighted: float64 [C].

        A request for which that is not known gets its ``error``; its values count for nothing.
        """
        assert self._foreign is not None
        rows: list[_Row] = []
        for request, beams in zip(requests, candidates):
            own = self._readings_of(request)
            own.candidates = []
            for beam in beams:
                parent = own.parent_of(beam)
                if parent.ended:  # it is its parent
                    own.candidates.append(parent)
                    continue
                rows.append(_Row(request, beam, parent, self._foreign.silent_ids))
                own.candidates.append(rows[-1].reading)
        self._listen(rows)
        runs = self._translate(rows)
        self._run([request for request in requests if request.error is None], runs)
        self._remember(requests)
        return [self._values(request) for request in requests]

    def close(self, request: Request, kept: Sequence[int]) -> None:
        """These of the candidates that were scored are its hypotheses now, best first."""
        own = self._of.get(request)
        if own is None:
            return
        before = self._slots(own)
        own.kept, own.candidates = [own.candidates[i] for i in kept], []
        for version in own.root.versions:
            version.slot = _NO_SLOT
        self._release(own, before)
        if all(reading.ended for reading in own.kept):
            del self._of[request]

    def give_up(self, request: Request) -> None:
        """Give back its slots, and the round under way. What it has kept stays known."""
        own = self._of.get(request)
        if own is None:
            return
        self._evict(own)
        own.candidates = []
        if request.beams.round == 0:  # it begins anew
            own.kept = []

    def forget(self, request: Request) -> None:
        """It has ended."""
        self.give_up(request)
        self._of.pop(request, None)

    def keep_only(self, requests: Iterable[Request]) -> None:
        """Give back every slot that none of these requests holds."""
        self._lane.join()
        alive = set(requests)
        self._of = {request: own for request, own in self._of.items() if request in alive}
        for request, own in self._of.items():
            if request.choice is None:
                own.candidates = []
        self._release_unknown()

    def make_room(self, pools: Sequence[PagePool]) -> None:
        """Between two steps: give up all slots in these pools, as far as they are of guides here.

        Texts that are gone on from are run again.
        """
        if any(model.pool is pool for model in self.models for pool in pools):
            for own in self._of.values():
                self._evict(own)

    # ---- what candidates say ----

    def _listen(self, rows: Sequence[_Row]) -> None:
        """What each of the candidates says now."""
        assert self._foreign is not None
        heard = self._foreign.listener.extend(
            [(row.request.prompt, row.tokens, row.parent.said, row.ends) for row in rows]
        )
        for row, said in zip(rows, heard):
            if isinstance(said, Exception):
                failure = EngineFailure(f"the response cannot be decoded: {said}")
                failure.__cause__ = said
                row.request.error = row.request.error or failure
            else:
                row.reading.said = said

    def _translate(self, rows: Sequence[_Row]) -> list[list[_Run]]:
        """The same in tokens of each model; what is to be run there."""
        every: list[list[_Run]] = []
        # Models that read the same prompt with the same tokenizer have the same texts.
        done: dict[tuple[int, int, str], Grown | Exception] = {}
        for m, translator in enumerate(self._translators):
            keys = [
                (id(translator), id(row.parent.versions[m].text), row.reading.said.text)
                for row in rows
            ]
            new = {key: row for key, row in zip(keys, rows) if key not in done}
            grown = translator.extend(
                [row.parent.versions[m].text for row in new.values()], [key[2] for key in new]
            )
            done.update(zip(new, grown))
            runs: list[_Run] = []
            for key, row in zip(keys, rows):
                text = done[key]
                if isinstance(text, Exception):
                    row.request.error = row.request.error or _as_own(text)
                    continue
                run = _Run(row, row.parent.versions[m], text, self._eos[m])
                row.reading.versions[m] = run.child
                runs.append(run)
                self._check_length(self.models[m], run)
            every.append(runs)
        return every

    def _check_length(self, model: PagedModel, run: _Run) -> None:
        limit = model.pool.max_tokens_per_slot
        if model.max_positions is not None:
            limit = min(limit, model.max_positions)
        length = len(run.child.text.ids)
        if length > limit:
            run.request.error = run.request.error or InvalidRequest(
                f"prompt and response have become {length} tokens long for {model.name}; allowed: "
                f"{limit}"
            )

    # ---- what the models say of it ----

    def _run(self, requests: Sequence[Request], runs: Sequence[Sequence[_Run]]) -> None:
        """Score what is new in all models; with less in the pages, where they are too few."""
        requests = [request for request in requests if request.error is None]
        if not requests:
            return
        taking_part = set(requests)
        own = [[run for run in of_model if run.request in taking_part] for of_model in runs]
        if self._passes(own) or self._passes(own):  # the second time nobody else holds any
            return
        if len(requests) > 1:
            half = len(requests) // 2
            for some in (requests[:half], requests[half:]):
                self._run(some, own)
            return
        names = ", ".join(model.name for model in self.models)
        requests[0].error = OutOfPages(
            f"its candidates do not fit into the KV cache of {names}; allowed: a shorter prompt, "
            "fewer candidates, or a larger kv_cache_tokens"
        )

    def _passes(self, runs: Sequence[Sequence[_Run]]) -> bool:
        """Run and score what is new; False: there is no room, and nobody holds any slot."""
        try:
            self._pass(runs)
        except OutOfPages:
            for run in chain.from_iterable(runs):
                run.child.slot = _NO_SLOT
            for own in self._of.values():
                self._evict(own)
            self._release_unknown()
            return False
        return True

    def _pass(self, runs: Sequence[Sequence[_Run]]) -> None:
        """Run and score what is new; OutOfPages: nothing is known."""
        slots = [self._fork(m, own) for m, own in enumerate(runs)]

        def run(g: int) -> list[Tensor]:
            members = self._groups.members[g]
            models = [self.models[m] for m in members]
            new = [[one for one in runs[m] if one.targets] for m in members]
            targets = [
                torch.tensor([t for one in own for t in one.targets], device=model.device)
                for model, own in zip(models, new)
            ]
            found = [[torch.zeros(0, device=model.device)] for model in models]
            for i, part, hidden in self._groups.forward(
                g,
                [
                    as_int32([slot for one, slot in zip(runs[m], slots[m]) if one.targets])
                    for m in members
                ],
                [[token for one in own for token in one.inputs] for own in new],
                [[len(one.inputs) for one in own] for own in new],
            ):
                own, size = targets[i][part.tokens], self._vocab_sizes[members[i]]
                found[i].append(models[i].token_partials(hidden, own, size).logprobs())
            return [torch.cat(own) for own in found]

        of_groups = two_at_a_time(self._lane, len(self._groups.members), run)
        tensors = self._groups.in_order(of_groups)
        if self._agree is not None:
            tensors = [self._agree(own) for own in tensors]
        device = self.models[0].device  # one reading is of one
        logprobs = Reading(*(brought(own, device) for own in tensors)).wait()
        for m, (model, own, found) in enumerate(zip(self.models, runs, logprobs)):
            values = found.double().numpy()
            ends = np.cumsum([len(one.targets) for one in own])
            for one, slot, part in zip(own, slots[m], np.split(values, ends[:-1])):
                broken = one.take(part)
                self.run_tokens[m] += len(one.targets)
                one.request.foreign_tokens += len(one.targets) if m == 0 else 0
                one.child.slot = slot
                if broken is not None and one.request.error is None:
                    one.request.error = NumericalError.at(model.name, broken)
            ended = [one.child for one in own if one.ends]
            model.pool.release([child.slot for child in ended])
            for child in ended:
                child.slot = _NO_SLOT

    def _fork(self, m: int, runs: Sequence[_Run]) -> list[int]:
        """A slot for each child, with what it has in common with its parent but the last token."""
        pool = self.models[m].pool
        children: dict[_Version, list[int]] = {}
        for i, run in enumerate(runs):
            children.setdefault(run.parent, []).append(i)
        if absent := [parent for parent in children if parent.slot == _NO_SLOT]:
            found = prefill(self.models[m], [parent.text.ids[:-1] for parent in absent])
            for parent, slot in zip(absent, found.tolist()):
                parent.slot = slot
        forked = pool.fork([parent.slot for parent in children], [*map(len, children.values())])
        slots = [_NO_SLOT] * len(runs)
        for i, slot in zip(chain.from_iterable(children.values()), forked.tolist()):
            slots[i] = slot
        pool.truncate(slots, [run.common - 1 for run in runs])
        return slots

    def _values(self, request: Request) -> NDArray[np.float64]:
        """Of its candidates, the guides' log-ratios, weighted and added."""
        assert self._foreign is not None
        candidates = self._of[request].candidates
        values = np.zeros(len(candidates))
        for own, roles in zip(self._foreign.guides, self._roles):
            for c, reading in enumerate(candidates):
                tuned, *untuned = (reading.versions[role].total for role in roles)
                values[c] += own.guide.weight * (tuned - sum(untuned))
        return values

    # ---- slots ----

    def _readings_of(self, request: Request) -> _Readings:
        if request not in self._of:
            prompt = request.foreign
            assert prompt is not None
            versions = [_Version(text, np.zeros(0)) for text in prompt.texts]
            self._of[request] = _Readings(_Reading(prompt.said, versions), [], [])
        return self._of[request]

    def _remember(self, requests: Sequence[Request]) -> None:
        """Let later requests find the prompts of these, in their first round."""
        for request in requests:
            if request.error is None and request.beams.round == 1:
                for model, version in zip(self.models, self._of[request].root.versions):
                    if version.slot != _NO_SLOT:
                        model.pool.remember([version.slot], [version.text.ids[:-1]])

    def _slots(self, own: _Readings) -> list[set[int]]:
        return [own.slots(m) for m in range(len(self.models))]

    def _release(self, own: _Readings, before: Sequence[set[int]]) -> None:
        """Give back what it no longer holds."""
        for model, slots, now in zip(self.models, before, self._slots(own)):
            model.pool.release(sorted(slots - now))

    def _release_unknown(self) -> None:
        for m, model in enumerate(self.models):
            held = sorted(slot for own in self._of.values() for slot in own.slots(m))
            model.pool.release_others(held)

    def _evict(self, own: _Readings) -> None:
        before = self._slots(own)
        for reading in (own.root, *own.kept, *own.candidates):
            for version in reading.versions:
                version.slot = _NO_SLOT
        self._release(own, before)


def _stands(model: PagedModel, version: _Version) -> bool:
    if version.slot == _NO_SLOT:
        return False
    return int(model.pool.lengths([version.slot])[0]) == len(version.text.ids) - 1


def _as_own(error: Exception) -> W2SFastError:
    if isinstance(error, W2SFastError):
        return error
    failure = EngineFailure(f"the response cannot be encoded: {error}")
    failure.__cause__ = error
    return failure
