"""An engine on its GPU path of which only the host's part takes time.

It is set up as on CUDA, over tiny models on the CPU. Once that is done, the models' bodies are
taken out: they answer random hidden states that were drawn before. Recordings run on a stopped
clock, so that there are tokens, scores and survivors; but those that the last round replayed, too,
are not run again: the host finds the tokens and scores that stood there, and survivors that are
drawn. Computing on the CPU would throw what the host needs out of its caches. What is left is what
the host does on a GPU as well, with two differences: an operator of torch that no recording holds
is computed here and launched there, and the launches of our own operators are left out;
``bench.host`` counts both. Of a copy from one side to the other the launch is measured, and not
the transfer. One to the device is made when something that may read it is run, else not at all: a
GPU's own copies leave the host's caches alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._ops
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import w2s_fast.kernels
from tests.support.device import DEVICE, Device
from tests.support.recorder import set_up_as_on_cuda
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.attention import launch_copy
from w2s_fast.scheduling import Runner
from w2s_fast.search import Request

BEAM_WIDTH = SUCCESSORS = 4
ROWS = BEAM_WIDTH * SUCCESSORS  # of a request
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, as glibc numbers them
WIDTH = 4  # of hidden states: as small as can be, for what torch computes is not the host's
VOCABULARY = 64
_TRIALS, _STOPS = 20, 100  # of the clock, to know what it costs to stop it


def keep_memory() -> None:
    """Let the C library keep what is freed, as torch keeps pinned memory: else a buffer of some
    hundred kilobytes is asked of the system in each round, which a GPU's host never does."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, 2**30)


class Clock:
    """Seconds without those of stand-ins.

    By default of this thread's processor time: the host has nothing to wait for here, so that on a
    quiet machine it is the same as the wall's. To stop it takes time, too; that is measured first,
    and does not count.
    """

    def __init__(self, timer: Callable[[], float] = time.thread_time) -> None:
        self._timer = timer
        self._away = 0.0
        self._stopped: float | None = None
        self._cost = 0.0  # of a stop
        nothing = self.stopped(lambda: None)
        costs = []
        for _ in range(_TRIALS):
            begin = self.now()
            for _ in range(_STOPS):
                nothing()
            costs.append((self.now() - begin) / _STOPS)
        self._cost = min(costs)

    def now(self) -> float:
        """Seconds; only differences mean anything."""
        return self._timer() - self._away if self._stopped is None else self._stopped

    @property
    def runs(self) -> bool:
        """Whether this is the host's time."""
        return self._stopped is None

    def stopped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which takes no time."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.runs:
                return function(*args, **kwargs)
            self._stopped = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._away, self._stopped = self._timer() - self._stopped + self._cost, None

        return run


class Transfers:
    """Copies to the device, made when something is run there.

    Attributes:
        at_once: whether none is put off.
    """

    def __init__(self) -> None:
        self.at_once = True
        self._pending: list[tuple[Tensor, Tensor]] = []

    def begin_round(self, at_once: bool) -> None:
        """What nobody has read, nobody will: a round brings its own."""
        self._pending.clear()
        self.at_once = at_once

    def put_off(self, source: Tensor, target: Tensor) -> None:
        self._pending.append((source, target))

    def make(self) -> None:
        """All that were put off."""
        for source, target in self._pending:
            launch_copy(source, target)
        self._pending.clear()


# Of all engines: rounds follow each other.
_transfers = Transfers()


class Replays:
    """Recordings of which those are run that a round does not have in common with the last one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before: list[object] = []
        self._now: list[object] = []
        self._same = False

    def begin_round(self) -> None:
        self._before, self._now = self._now, []
        self._same = True

    def differ(self) -> None:
        """What follows in this round is run."""
        self._same = False

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """As a Recorder does."""

        def run_it() -> None:
            _transfers.make()
            run()

        run_it()
        stopped = self._clock.stopped(run_it)

        def replay() -> None:
            place = len(self._now)
            self._now.append(stopped)
            if not (self._same and place < len(self._before) and self._before[place] is stopped):
                self._same = False
                stopped()

        return replay


@dataclass(frozen=True)
class Size:
    """What is searched.

    Attributes:
        requests: all at once, each with :data:`ROWS` rows.
        chunk: tokens that a round samples for a row.
        prompt: tokens of each prompt.
        longest: tokens that a response may have.
    """

    requests: int
    chunk: int
    prompt: int
    longest: int

    @property
    def rows(self) -> int:
        return self.requests * ROWS

    @property
    def params(self) -> SearchParams:
        return SearchParams(
            beam_width=BEAM_WIDTH,
            successors=SUCCESSORS,
            chunk_length=self.chunk,
            max_new_tokens=self.longest,
            top_k=0,
            ignore_eos=True,
        )


class HostEngine:
    """Requests of one size, a step of the engine after the other.

    Attributes:
        clock: the host's.
        by_hand: passes of a model that no recording served, so far. The host would run the model's
            own code there, whose time is not measured.
    """

    def __init__(
        self, size: Size, device: Device | None = None, clock: Clock | None = None
    ) -> None:
        """``device``: where what crosses is counted; it must exist for all steps. None: nothing
        is counted, and no time is lost by counting. ``clock``: another than the processor's."""
        keep_memory()
        self.size = size
        self.clock = clock or Clock()
        self.by_hand = 0

        self._replays = Replays(self.clock)
        recorder = self.clock.stopped(self._replays.record)
        if device is not None:
            recorder = device.recorder(recorder)
        with set_up_as_on_cuda(lambda _: recorder):
            self.engine = Engine(
                self._model(0),
                Guide(self._model(1), self._model(2)),
                device="cpu" if device is None else DEVICE,
                kv_cache_tokens=self._tokens(),
                max_rows=size.rows,
                # All enter in the same step, so that their rounds begin together.
                max_pass_tokens=size.requests * max(size.prompt, ROWS * size.chunk),
            )
        # A step of all of them, so that the host's part of a round is seen as a whole.
        self.engine.runner = Runner(self.engine._search, self.engine._scheduler, cohorts=1)
        for model in (self.engine.base, *self.engine.guides[0].models):
            self._take_out_body(model)
            for recordings in model.recorded:
                self._notice_missing(recordings)
        self._requests: list[Request] = []
        self._draw = np.random.default_rng(0)
        self._counted = device is not None  # then nothing may be copied there beside
        self._selected: Any = None  # what the last selection was recorded or run on
        scores = self.engine._search.guides._graphs
        assert scores is not None
        find = scores.recordings.find

        def found(bucket: Any) -> Any:
            recording = find(bucket)
            self._selected = recording.static
            return recording

        scores.recordings.find = found  # type: ignore[method-assign]

    def _model(self, seed: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=self.size.prompt + self.size.longest,
            n_embd=WIDTH,
            n_layer=1,
            n_head=1,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
        model = GPT2LMHeadModel(config).eval()
        model.lm_head.weight.data.normal_()  # scores then differ from candidate to candidate
        return model

    def _tokens(self) -> int:
        """Room for every hypothesis by itself, and for a chunk and two pages of every row."""
        size = self.size
        page = 16
        histories = size.prompt + BEAM_WIDTH * (size.longest + page)
        own = histories + ROWS * (size.chunk + 2 * page)
        return size.requests * own * 11 // 10  # the scheduler leaves some pages free

    def _take_out_body(self, model: Any) -> None:
        size = self.size
        most = max(size.prompt, ROWS * (size.chunk + 1)) * size.requests
        hidden = torch.randn(most, WIDTH, device=model.device)

        def body(*, input_ids: Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=hidden[None, : input_ids.shape[1]])

        stopped = self.clock.stopped(body)

        def forward(**given: Any) -> Any:
            self.by_hand += self.clock.runs
            self._replays.differ()
            return stopped(**given)

        model.view.base_model.forward = forward
        head = model.view.get_output_embeddings()
        head.forward = self.clock.stopped(head.forward)

    def _notice_missing(self, recordings: Any) -> None:
        """What has no recording is run as it is: then all that was copied has to be there."""
        find = recordings.find
        make = self.clock.stopped(_transfers.make)

        def found(bucket: Any) -> Any:
            recording = find(bucket)
            if isinstance(recording.replay, MethodType):  # of what would be recorded
                _transfers.at_once = True
                make()
            return recording

        recordings.find = found

    @contextmanager
    def searching(self) -> Iterator[None]:
        """For ``with``: all requests are under way, and operators take no time."""
        size, engine = self.size, self.engine
        with _operators_on(self.clock):
            for i in range(size.requests):
                prompt = [(i // VOCABULARY**j) % VOCABULARY for j in range(3)]  # begins like none
                prompt += [j % VOCABULARY for j in range(size.prompt - len(prompt))]
                self._requests.append(engine.make_request(prompt, size.params, 0))
                engine.runner.submit(self._requests[-1])
            try:
                yield
            finally:
                for request in self._requests:
                    engine.runner.give_up(request)
                engine.runner.settle()
                self._requests.clear()

    def record_missed(self) -> None:
        """Record all shapes that came twice, as an engine does when nobody waits."""
        for model in (self.engine.base, *self.engine.guides[0].models):
            for recorded in model.recorded:
                while recorded.record_missed():
                    pass

    def round(self) -> float:
        """One round of all requests: the host's seconds.

        Raises:
            RuntimeError: not all requests took part, or they did not sample whole chunks.
        """
        seconds = 0.0
        self._replays.begin_round()
        _transfers.begin_round(at_once=self._counted)  # what is counted has to cross
        self._keep_others()
        before = self.engine.stats()
        rounds = before.rounds
        while rounds == before.rounds:
            begin = self.clock.now()
            self.engine.runner.advance(self._requests)
            seconds += self.clock.now() - begin
            rounds = self.engine.stats().rounds
        sampled = self.engine.stats().sampled_tokens - before.sampled_tokens
        took_part = rounds - before.rounds
        if (took_part, sampled) != (self.size.requests, self.size.rows * self.size.chunk):
            raise RuntimeError(
                f"{took_part} requests sampled {sampled} tokens; wanted: {self.size}"
            )
        return seconds

    def _keep_others(self) -> None:
        """Draw who is kept if the selection is not run again: histories then meet, as in a search
        that has something to choose by."""
        if self._selected is None or self._counted:
            return
        requests, width = self.size.requests, self._selected.bucket.sizes.max_width
        order = self._draw.permuted(np.tile(np.arange(ROWS), (requests, 1)), axis=1)
        kept = np.full((requests, width), -1)
        kept[:, :BEAM_WIDTH] = order[:, :BEAM_WIDTH]
        with torch.inference_mode():
            self._selected.packed[: kept.size].copy_(torch.from_numpy(kept).flatten())


@contextmanager
def _operators_on(clock: Clock) -> Iterator[None]:
    """Every operator of this package is called on the stopped clock.

    Those that only write are left out: no body is there to read what stands in the pages.
    """
    with ExitStack() as patches:
        for module in pkgutil.iter_modules(w2s_fast.kernels.__path__):
            names = vars(importlib.import_module(f"w2s_fast.kernels.{module.name}"))
            operators = {
                name: clock.stopped(value) if value._schema.returns else _nothing
                for name, value in names.items()
                if isinstance(value, torch._ops.OpOverload) and value.namespace == "w2s_fast"
            }
            patches.enter_context(mock.patch.dict(names, operators))
        launches = _launches(clock)
        for name, loaded in list(sys.modules.items()):
            if name.startswith("w2s_fast.") and vars(loaded).get("launch_copy") is launch_copy:
                launch = launches.get(name.rpartition(".")[2], launches["others"])
                patches.enter_context(mock.patch.object(loaded, "launch_copy", launch))
        yield


def _launches(clock: Clock) -> dict[str, Callable[[Tensor, Tensor], None]]:
    """launch_copy for some modules, by name. Of each the copy of one byte is measured."""
    here, there = torch.zeros(2, 1, dtype=torch.uint8)
    make, transfer = clock.stopped(_transfers.make), clock.stopped(launch_copy)

    def read(source: Tensor, target: Tensor) -> None:
        there.copy_(here, non_blocking=True)
        transfer(source, target)

    def at_once(source: Tensor, target: Tensor) -> None:
        make()  # in their order
        read(source, target)

    def for_recordings(source: Tensor, target: Tensor) -> None:
        if _transfers.at_once:
            read(source, target)
        else:
            there.copy_(here, non_blocking=True)
            _transfers.put_off(source, target)

    # Nothing but recordings reads what these two bring.
    own = {"static_passes": for_recordings, "score_graphs": for_recordings}
    return {**own, "staging": read, "others": at_once}


def _nothing(*_: Any) -> None:
    """In the place of an operator that only writes."""
