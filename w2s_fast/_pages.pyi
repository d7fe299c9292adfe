"""Types of the compiled module; csrc/page_manager.h, beams.h and rounds.h say what each does.

Every array is one-dimensional unless a shape is given; arguments must be contiguous int32 arrays
(anything else is a TypeError). Operations raise PageMisuse or OutOfPages and then change nothing.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

class Hold:
    """A lock held for a block, whatever interrupts it; csrc/hold.h says what the arguments are."""

    def __init__(
        self,
        lock: Lock,
        *,
        queue: Lock | None = None,
        wait: bool = True,
        begin: Callable[[], object] | None = None,
        end: Callable[[BaseException | None], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> None: ...
    def __enter__(self) -> bool:
        """Whether the lock is held: always, if it was to be waited for."""
    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...

class CacheStatistics:
    @property
    def lookups(self) -> int:
        """Prompts that adopt was asked for."""
    @property
    def lookup_tokens(self) -> int:
        """Tokens of these prompts."""
    @property
    def hit_tokens(self) -> int:
        """Those of them that adopt attached."""
    @property
    def evictions(self) -> int:
        """Cached pages taken for something else."""

class PageManager:
    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_slots: int,
        max_pages_per_slot: int,
        prefix_cache: bool = False,
        hash_bits: int = 64,
    ) -> None: ...
    def allocate(self, n: int) -> Int32: ...
    def reserve(self, slots: Int32, tokens: Int32) -> Int32:
        """Returns page copies, int32 [c, 2]: (source, destination)."""
    def pages_needed(self, slots: Int32, tokens: Int32) -> int: ...
    def places(self, slots: Int32, tokens: Int32) -> NDArray[np.int64]: ...
    def extend(self, slots: Int32, tokens: Int32) -> None: ...
    def fork(self, slots: Int32, counts: Int32) -> tuple[Int32, Int32]:
        """Returns the children, grouped by parent, and page copies as reserve does."""
    def truncate(self, slots: Int32, lengths: Int32) -> None: ...
    def trim(self, slots: Int32) -> None: ...
    def release(self, slots: Int32) -> None: ...
    def page_table(self, slots: Int32) -> Int32:
        """[n, the most pages that one of them holds]; -1 behind a slot's pages."""
    def match(self, tokens: Int32, counts: Int32) -> Int32:
        """Returns how many tokens of each sequence are cached."""
    def adopt(self, slots: Int32, tokens: Int32, counts: Int32) -> Int32:
        """Returns how many tokens each slot was given."""
    def remember(self, slots: Int32, tokens: Int32, counts: Int32) -> int:
        """Returns how many pages are new in the cache."""
    def drop_cache(self) -> None: ...
    def check(self) -> None:
        """Walks everything; RuntimeError names the broken rule."""
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def max_slots(self) -> int: ...
    @property
    def max_pages_per_slot(self) -> int: ...
    @property
    def prefix_cache(self) -> bool: ...
    @property
    def cached_pages(self) -> int: ...
    @property
    def cache_statistics(self) -> CacheStatistics:
        """As of now; it does not change later."""
    @property
    def free_pages(self) -> int:
        """Cached pages that no slot holds included."""
    @property
    def used_pages(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def lengths(self) -> Int32:
        """Read-only live view [max_slots]."""
    @property
    def held_pages(self) -> Int32:
        """Read-only live view [max_slots]: pages held, reserved ones too; -1 = free slot."""
    @property
    def last_pages(self) -> Int32:
        """Read-only live view [max_slots]: the last of these pages; -1 = none."""
    @property
    def pages_before(self) -> Int32:
        """Read-only live view [num_pages]: the page that each follows; -1 = none."""
    @property
    def holders(self) -> Int32:
        """Read-only live view [num_pages]: slots that end in each, and pages in use that follow."""

def fill_fields(
    buffer: NDArray[np.uint8],
    fields: Sequence[tuple[int, int, bytes, str]],
    values: Sequence[NDArray[Any]],
) -> None:
    """Fields are (offset in bytes, items, one spare item, kind): values, and spare items behind."""

class PassLayout:
    """One forward pass, laid out for the attention kernels; see csrc/plan.h."""

    def __init__(
        self,
        pages: PageManager,
        slots: Int32,
        counts: Int32,
        first: Int32,
        count: Int32,
        begin: Int32,
        end: Int32,
        own: Int32,
        split_keys: int,
        split_queries: int,
        ahead: int = 0,
    ) -> None: ...
    @property
    def bounds(self) -> Bounds:
        """rows, tokens, splits, pages, max_q, max_k, max_own, max_tokens, max_parts."""
    def write(
        self,
        buffer: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        rows: int,
        tokens: int,
        splits: int,
        pages: int,
        back: bool = False,
    ) -> None:
        """Fill a buffer with room for so many; ``offsets``: of the fields in PassField's order."""

# first, count, begin, end [N] and own [S], see RowTree in w2s_fast/attention/row_tree.py.
Tree = tuple[Int32, Int32, Int32, Int32, Int32]
SHORTEST_SEGMENT: int
# (request's index, token's index among the new ones or -1, position in the response)
Broken = list[tuple[int, int, int]]

class Beam:
    """A beam of a request, as it was when it was asked for."""

    @property
    def parent(self) -> int | None:
        """Index of its parent among the kept of the round before; None in round 1."""
    @property
    def tokens(self) -> list[int]:
        """The whole response so far."""
    @property
    def logprobs(self) -> list[float]:
        """The base's log-prob of each token, at temperature 1."""
    @property
    def token_scores(self) -> list[float]:
        """Each token's weighted log-ratio, added over the guides; of those that were scored."""
    @property
    def total(self) -> float:
        """Sum of the token scores, as the selection computed it; of beam search the log-prob, and
        once it is finished what it is ranked by."""
    @property
    def extra(self) -> float:
        """What others than the guides say of it, weighted; of candidates that were chosen from."""
    @property
    def finish_reason(self) -> Literal["eos", "stop", "length"] | None: ...
    @property
    def ending(self) -> int | None:
        """How its text ended, as `end_text` was told; None: it has not."""
    @property
    def slots(self) -> list[int]:
        """Its slot in the base, and in each guide's tuned and untuned model; -1: none."""

class BeamsOfRound:
    @property
    def candidates(self) -> list[Beam]: ...
    @property
    def kept(self) -> list[int]:
        """Indices of candidates, best first."""

class Beams:
    """The beams of one request; csrc/beams.h says what each operation does."""

    def __init__(
        self,
        prompt: Sequence[int],
        guide_prompts: Sequence[tuple[int, int]],
        *,
        first_candidates: int,
        widths: Sequence[int],
        successors: Sequence[int],
        chunks: Sequence[int],
        max_new_tokens: int,
        hold: bool,
        mean: bool,
        dedup: bool,
        uses_guides: bool,
        trace: bool,
        copies: bool,
        eos_ids: Sequence[int],
        stop_ids: Sequence[int],
        min_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
        betas: Sequence[float],
        plausibility: float,
        dynamic: bool,
        length_penalty: float | None = None,
        early_stopping: bool | None = None,
    ) -> None:
        """`guide_prompts`: length and last token, of each model but the base.

        `widths`, `successors`, `chunks`: an entry a round, the last one goes on. With a
        `length_penalty` it is a beam search of the base alone; `early_stopping` of None is "never".
        """
    @property
    def round(self) -> int:
        """The one under way, or the last one; 0 before the first."""
    @property
    def open(self) -> bool:
        """Whether a round is under way."""
    @property
    def forked(self) -> bool:
        """Whether its candidates have slots of their own in the base."""
    @property
    def aside(self) -> bool:
        """Whether its slots were given up between two rounds."""
    @property
    def holds(self) -> bool:
        """Whether it holds slots: it has begun, and was not set aside since."""
    @property
    def done(self) -> bool:
        """Whether all hypotheses are finished, and no round is under way."""
    @property
    def sampled(self) -> int:
        """Tokens sampled so far."""
    @property
    def judged(self) -> int:
        """Candidates of the rounds that have ended."""
    @property
    def chosen(self) -> int:
        """Those of them that were kept."""
    @property
    def scored(self) -> int:
        """Tokens scored so far, by each guide."""
    @property
    def blocks(self) -> int:
        """Blocks of tokens that there is room for."""
    @property
    def shared(self) -> int:
        """First tokens that all hypotheses that go on have from the same ancestor."""
    @property
    def tokens_left(self) -> int: ...
    @property
    def grown(self) -> int:
        """Tokens of the shortest candidate that grows; 0: there is none."""
    def agreed(self) -> list[int]: ...
    def new_texts(self) -> list[tuple[int, int, list[int]]]:
        """Candidates that have got tokens in this round, are not paused, and whose texts have not
        ended: how many tokens each had before, and all but one that ends the response by itself."""
    def end_text(self, candidate: int, length: int, ending: int) -> None:
        """The text of a candidate ends in token `length`, which is not kept. `ending` is for its
        owner, who knows how."""
    def pause(self, candidate: int, length: int) -> None:
        """The chunk of a candidate ends with the token before `length`, of those that it has got in
        this round: what comes behind was not drawn, and nothing more is until the selection."""
    def take_text(self, candidate: int, tokens: Sequence[int], *, sampled: int, ends: bool) -> None:
        """A growing candidate gets bytes of text that somebody else has sampled, and an EOS behind
        them if that was; `sampled` tokens in all. If it `ends`, nothing may follow."""
    def pause_growing(self) -> None:
        """The chunks of all candidates that still grow end where they are."""
    @property
    def kept(self) -> list[Beam]:
        """The hypotheses, best first; within a round they are the candidates' parents."""
    @property
    def candidates(self) -> list[Beam]: ...
    def trace(self, first: int = 0) -> list[BeamsOfRound]:
        """Rounds that have ended, from that one on."""
    def set_extras(self, extras: NDArray[np.float64]) -> None: ...
    def slot_of_first(self, model: int) -> int:
        """The first candidate's slot, which has the pages of its parent."""
    def kept_slots(self, model: int) -> Int32:
        """Of the root, or of the hypotheses that go on; -1: none yet."""
    def set_kept_slots(self, model: int, slots: Int32) -> None: ...
    def resume(self) -> None: ...
    def set_aside(self, managers: Sequence[PageManager]) -> None: ...
    def start_over(self, managers: Sequence[PageManager]) -> None: ...
    def abort(self, managers: Sequence[PageManager]) -> None: ...

def cut_levels(levels: Sequence[tuple[Int32, Int32]], rows: int) -> Tree: ...

# csrc/rounds.h says what these do. Rows and candidates stand request by request.

def begin_rounds(requests: Sequence[Beams]) -> None: ...
def tokens_left(requests: Sequence[Beams]) -> list[int]: ...
def entering(requests: Sequence[Beams], managers: Sequence[PageManager]) -> list[int]:
    """Indices of requests that have to wait for texts that do not stand yet."""

def progress(requests: Sequence[Beams]) -> tuple[int, int]:
    """Tokens sampled, and tokens scored so far, of all of them."""

def in_rounds(requests: Sequence[Beams]) -> list[bool]:
    """Of each, whether it is in the middle of a round."""

def are_done(requests: Sequence[Beams]) -> list[bool]:
    """Of each, whether all its hypotheses are finished, and no round is under way."""

def lacking(requests: Sequence[Beams], manager: PageManager, model: int) -> NDArray[np.bool_]:
    """Returns [R]: whether texts of a request do not stand in one model yet."""

def lay_out_sources(
    requests: Sequence[Beams], manager: PageManager, model: int
) -> tuple[Int32, Int32, Int32, Int64, Tree]:
    """Returns slots, counts and children [N], tokens [T], and what they share."""

def fork_beams(requests: Sequence[Beams], manager: PageManager, model: int) -> Int32:
    """Returns page copies, as PageManager.fork does."""

def fork_in_guides(requests: Sequence[Beams], managers: Sequence[PageManager]) -> list[Int32]:
    """The same in all models but the base, whose managers these are."""

def lay_out_rows(
    requests: Sequence[Beams], model: int
) -> tuple[
    Int32,
    tuple[Float32, Int64, Float64, Float64, Int64, Int64, Int64],
    Tree,
    tuple[Float32, Float32, NDArray[np.bool_]],
]:
    """Returns slots [S], sampling columns [S] each, what the rows share, and of those that fuse
    factors [S * G], log of plausibility [S], and whether factors are chosen [S]."""

class PassRoom:
    """Where the fields of a pass lie in a buffer, in PassField's order; and the room there is."""

    def __init__(self, offsets: Int64, rows: int, tokens: int, splits: int, pages: int) -> None: ...

class SplitRule:
    """How attention cuts keys; csrc/bucket.h."""

    def __init__(self, split_keys: int, split_queries: int, few_keys: int) -> None: ...

Bounds = tuple[int, int, int, int, int, int, int, int, int]
# In the order of Bucket in w2s_fast/attention/static_plan.py.
Bucket = tuple[int, int, int, int, int, int, int, int]

def smallest_bucket(
    rule: SplitRule, rows: int, tokens: int, max_q: int, most_pages: int
) -> Bucket: ...
def bucket_of(
    rule: SplitRule, bounds: Bounds, rows: int, tokens: int, most_pages: int
) -> Bucket: ...
def round_up_tokens(count: int, /) -> int:
    """At most a quarter more: the work of a pass grows with its tokens."""

class DrawLayout:
    """One draw of many requests, as recordings run it; see csrc/draw.h."""

    def __init__(self, requests: Sequence[Beams], managers: Sequence[PageManager]) -> None:
        """``managers``: of the models that draw, the base first."""
    @property
    def rows(self) -> int:
        """Candidates that will grow."""
    @property
    def tokens(self) -> int:
        """The most that sources of a model run, and the most of one source: ``max_new``."""
    @property
    def max_new(self) -> int: ...
    @property
    def num_sources(self) -> int: ...
    @property
    def some_plausible(self) -> bool:
        """Once it has begun: whether rows need a share of the likeliest token's probability."""
    @property
    def some_dynamic(self) -> bool:
        """Once it has begun: whether rows choose their factors."""
    def begin(self, steps: int, split_keys: int, split_queries: int) -> None:
        """Move on in the models' pages. OutOfPages, in the middle of it."""
    def buckets(
        self, rule: SplitRule, rows: int, sources: int, most: int, most_pages: Sequence[int]
    ) -> tuple[list[Bucket], list[Bucket]]:
        """Of each model: of the sources' pass, and of the rows' ones.

        ``rows``, ``sources``: what both are rounded up to. ``most``: tokens of sources.
        ``most_pages``: of a row, in each model."""
    def before(self, model: int) -> Int32:
        """Pages to be copied before the sources run: [num_before, 2]."""
    @property
    def num_before(self) -> list[int]:
        """Of each model."""
    @property
    def num_copies(self) -> list[int]:
        """Pages of each model to be copied before the second tokens: among the rows' columns."""
    def write_rows(
        self,
        buffer: NDArray[np.uint8],
        rooms: Sequence[PassRoom],
        columns: Sequence[Int64],
    ) -> None: ...
    def write_sources(
        self,
        buffer: NDArray[np.uint8],
        rooms: Sequence[PassRoom],
        columns: Sequence[Int64],
        rows: int,
    ) -> None: ...

def take_tokens(
    requests: Sequence[Beams], memory: NDArray[np.uint8], rows: int, logprobs: int
) -> Broken:
    """``memory``: of Draws, [steps, n]; where in a step log-probs begin."""

def take_fused(
    requests: Sequence[Beams],
    memory: NDArray[np.uint8],
    rows: int,
    logprobs: int,
    others: int,
    models: int,
    room: int,
    guides: Sequence[tuple[float, int, int]],
) -> Broken:
    """The same with log-probs of other models, and so with scores. ``guides``: weight, and places
    of the tuned and the untuned model; -1: there is none."""

def growing(requests: Sequence[Beams]) -> list[int]:
    """Of each request, candidates that are not finished."""

def release_finished(requests: Sequence[Beams], manager: PageManager, model: int) -> None:
    """Give back what finished candidates hold in a model, and of paused ones what stands behind
    their texts."""

class ScoringLayout:
    """What the guides and score_select are given, in one buffer; Scoring in csrc/rounds.h."""

    def __init__(
        self,
        requests: Sequence[Beams],
        drawing: Sequence[Beams],
        steps: int,
        weights: Sequence[float],
    ) -> None: ...
    @property
    def counts(self) -> Int32:
        """New tokens of each candidate that runs."""
    @property
    def cu_tokens(self) -> Int64: ...
    @property
    def rows(self) -> list[tuple[Int32, Tree, Int32]]:
        """Of each model of the guides slots [S], what the rows share, and how many tokens each
        holds before its chunk [S]."""
    @property
    def columns(self) -> list[tuple[str, str, int]]:
        """Name, dtype and items of each column; those of score_select from weights on."""
    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """Rounds, candidates, new tokens, ids that end responses, known tokens; the most candidates
        of a round, and the most it keeps."""
    @property
    def num_rows(self) -> int:
        """Candidates that run."""
    @property
    def max_new(self) -> int:
        """The most new tokens of one of them."""
    @property
    def num_drawn(self) -> int:
        """Rows of the tokens that are not known."""
    def begin(
        self, managers: Sequence[PageManager], split_keys: int, split_queries: int
    ) -> list[Int32]:
        """Move on in the guides' pages: of each model, pages to be copied.

        OutOfPages, in the middle of it."""
    def buckets(
        self, rule: SplitRule, rows: int, tokens: int, most_pages: Sequence[int]
    ) -> list[Bucket]:
        """Of each model's pass, with room for so many rows and tokens."""
    def write(
        self,
        buffer: NDArray[np.uint8],
        offsets: Int64,
        items: Int64,
        room: int,
        rooms: Sequence[PassRoom],
        copies: Sequence[Int32] = (),
        of_copies: Sequence[int] = (),
    ) -> None:
        """``offsets``, ``items``: of the columns. ``room``: rows of the buffer of drawn tokens.
        ``rooms``: of the models' passes. ``copies``: for each of them pairs of pages [n, 2], and
        ``of_copies``, where those go."""

def take_scores(
    requests: Sequence[Beams],
    cu_tokens: Int64,
    packed: Int64,
    kept: int,
    candidates: int,
    tokens: int,
) -> Broken:
    """``packed``: of score_select, for so many kept in all, candidates and tokens."""

def take_selected(
    requests: Sequence[Beams],
    drawing: Sequence[Beams],
    cu_tokens: Int64,
    packed: Int64,
    kept: int,
    candidates: int,
    tokens: int,
    steps: int,
) -> Broken:
    """Of each growing candidate of those ``drawing`` the last ``steps`` tokens of its chunk, as
    they were drawn. What is broken is counted among them."""

def broken_continuations(requests: Sequence[Beams], tokens: Int32, logprobs: Float32) -> Broken:
    """``logprobs`` [rows, k] of beams that go on, best first; csrc/beam_search.h says of which."""

def rank_continuations(
    requests: Sequence[Beams], tokens: Int32, logprobs: Float32, request: int
) -> list[tuple[int, int, bool]]:
    """All continuations of a beam search, best first: the kept beam that each comes from, its
    token, and whether that ends a response by itself. None where one is broken."""

def advance_beams(
    requests: Sequence[Beams],
    tokens: Int32,
    logprobs: Float32,
    base: PageManager,
    ended: Sequence[tuple[int, int, int, int]] = (),
) -> Int32:
    """Close the rounds of beam searches by the likeliest continuations of each beam [rows, k].

    `ended`: continuations with which a text ends: (request, rank, length, ending), in order; see
    `Beams.end_text`.

    Those with a broken log-prob stay as they are. Returns page copies, as PageManager.fork does.
    OutOfPages, in the middle of it."""

def any_broken(packed: Int64, kept: int, candidates: int, tokens: int, used: int) -> bool:
    """Whether some score is not finite, of the first ``used`` candidates."""

class DictWatch:
    """Says of dicts whether they were written to, without looking into them."""

    def __init__(self, dicts: list[dict[str, Any]]) -> None: ...
    def changed(self) -> bool:
        """Since :meth:`settle`, or since it was made. It may say so where all is as it was."""
    def settle(self) -> None: ...

class NumberWatch:
    """Says of tensors whether they were written to, or stand elsewhere."""

    def __init__(self, versioned: list[Any], stored: list[Any]) -> None:
        """Those that count their writes, and those that have an address."""
    @property
    def versions(self) -> list[int]:
        """As they were when this was made; ``addresses``, too."""
    @property
    def addresses(self) -> list[int]: ...
    def changed(self) -> bool:
        """Since it was made."""

def same_dicts(now: list[dict[str, Any]], seen: list[dict[str, Any]], /) -> bool:
    """Whether they are equal; what cannot be compared is not."""

def end_rounds(
    requests: Sequence[Beams], kept: Int64, managers: Sequence[PageManager]
) -> list[Int32]:
    """Returns, of each manager, pages to be copied for candidates that are kept more than once."""

def keep_all(requests: Sequence[Beams], managers: Sequence[PageManager]) -> None: ...
def round_rows(requests: Sequence[Beams]) -> list[int]:
    """Candidates that grow in the round under way, or else in the next one, as it begins."""

def round_pages(requests: Sequence[Beams], page_sizes: Sequence[int]) -> list[list[int]]:
    """Returns pages of each request in each model, 0 where it runs not."""

def held_slots(requests: Sequence[Beams], model: int) -> Int32: ...
