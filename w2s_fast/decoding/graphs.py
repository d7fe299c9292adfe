"""The recordings of one model: what it runs for a bucket of shapes, recorded once and replayed.

``pass_graphs`` records what appends tokens, and ``decode_graphs`` steps that sample as well.
"""

from __future__ import annotations

import functools
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from w2s_fast.decoding.recorder import NothingRecorded, Recorder
from w2s_fast.models import PagedModel, inference

# Graphs of one model; each holds some memory of the driver's besides the pool that they share.
# Shapes beyond run without: to throw one away for another could mean to record in every round.
_MOST_RECORDINGS = 128
_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_MORE_ROWS = 256
# New tokens of a row that is recorded: longer ones are prompts, of lengths that hardly come again.
MOST_NEW = 64
# New tokens of a candidate's chunk that a recorded pass of the guides has room for, on average.
_TOKENS_PER_ROW = 8
# And for at least so many in all: a few rows may have long chunks.
_LEAST_TOKENS = 2048


class Static(Protocol):
    """What runs for a bucket, on tensors that stay where they are."""

    def clear(self) -> None:
        """Leave no rows, so that whatever runs writes nowhere."""
        ...

    def run(self) -> None:
        """Run it once, for what was loaded."""
        ...


B = TypeVar("B", bound=Hashable)
S = TypeVar("S", bound=Static)


class Recording(NamedTuple, Generic[S]):
    """What does the work, and the tensors that it reads and writes."""

    replay: Callable[[], None]
    static: S


class Recordings(Generic[B, S]):
    """Recordings of models, by bucket. They are used on one stream, one after the other.

    The first time a bucket comes it runs on the same tensors, in the same shapes, as it will later,
    so that both give the same bits. One that came twice is recorded between two steps, see
    :meth:`record_missed`: a shape that comes once is not worth it.
    All are dropped when a model's weights have moved: recordings read fixed addresses.
    """

    def __init__(
        self, models: Sequence[PagedModel], recorder: Recorder, prepare: Callable[[B], S]
    ) -> None:
        """``models``: that a recording runs. ``prepare``: makes the tensors of a bucket."""
        self._models = list(models)
        self._record = recorder
        self._prepare = prepare
        self._static: dict[B, S] = {}
        self._made: dict[B, Recording[S]] = {}
        self._missed: Counter[B] = Counter()  # how often each came without a recording
        self._missed_most = 0  # of those the most: asked for after every step
        self._failed = False
        self._moves = self._moved()
        models[0].recorded.append(self)

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[B]:
        return iter(self._made)

    def __getitem__(self, bucket: B) -> Recording[S]:
        return self._made[bucket]

    @property
    def usable(self) -> bool:
        """Whether these models can be recorded; else they run without what is here."""
        return not self._failed and all(model.recordable for model in self._models)

    def find(self, bucket: B) -> Recording[S]:
        """What runs for a bucket, recorded or not. To be called before anything is loaded."""
        moves = self._moved()
        if self._moves != moves:
            self._moves = moves
            self._missed.update(list(self._made))
            self._missed_most = max(self._missed.values(), default=0)
            self._made.clear()
        if (made := self._made.get(bucket)) is not None:
            return made
        self._missed[bucket] += 1
        self._missed_most = max(self._missed_most, self._missed[bucket])
        static = self.static_of(bucket)
        return Recording(static.run, static)

    def missed(self, least: int) -> bool:
        """Whether some bucket was missed ``least`` times: :meth:`record_missed` would record it."""
        return self._missed_most >= least

    def record_missed(self, least: int = 2) -> bool:
        """Record the bucket that was missed most often, if that was ``least`` times.

        Returns:
            Whether there was one.
        """
        if self._missed_most < least:
            return False
        ((bucket, _),) = self._missed.most_common(1)
        del self._missed[bucket]
        self._missed_most = max(self._missed.values(), default=0)
        self.make(bucket)
        return True

    @inference
    def make(self, bucket: B) -> None:
        """Record a bucket, unless there are too many, or this model cannot be recorded."""
        if not self.usable or bucket in self._made or len(self._made) >= _MOST_RECORDINGS:
            return
        try:
            static = self.static_of(bucket)
            static.clear()
            self._made[bucket] = Recording(self._record(static.run), static)
        except NothingRecorded:  # whoever met it first has said why
            self._failed = True
        except Exception as error:  # a model's own code may do anything that cannot be recorded
            names = " and ".join(model.name for model in self._models)
            kinds = ", ".join(dict.fromkeys(type(m.model).__name__ for m in self._models))
            if len(self._models) == 1:
                self._models[0].recordable = False
                what = f"{names} runs without CUDA graphs"
            else:
                self._failed = True
                what = f"{names} do not run in one CUDA graph"
            warnings.warn(
                f"{what}: a pass of {kinds} cannot be recorded: {error}",
                stacklevel=2,
            )

    def static_of(self, bucket: B) -> S:
        """The tensors of a bucket."""
        if bucket not in self._static:
            self._static[bucket] = self._prepare(bucket)
        return self._static[bucket]

    def _moved(self) -> int:
        return sum(model.moves for model in self._models)


@functools.lru_cache
def rows_recorded(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that are recorded. Padding costs little, since weights are read anyway."""
    rungs = [*_ROWS, *range(_ROWS[-1] + _MORE_ROWS, max_rows, _MORE_ROWS)]
    return (*(rows for rows in rungs if rows < max_rows), max_rows)


def round_up_rows(rows: int, max_rows: int) -> int:
    """The next of :func:`rows_recorded`, which ``rows`` must not exceed."""
    recorded = rows_recorded(max_rows)
    return recorded[bisect_left(recorded, rows)]


def most_pass_tokens(max_rows: int) -> int:
    """Tokens of the largest recorded pass that is not one of decoding steps."""
    return max(_TOKENS_PER_ROW * max_rows, _LEAST_TOKENS)
