// The paged KV-cache manager: which page holds which tokens of which sequence.
//
// It does the bookkeeping only: it never sees keys or values, and it knows neither Python nor
// CUDA. Where contents have to move, it returns (source, destination) pairs and the owner of the
// KV tensor copies.
//
// Terms
//   page    room for the keys and values of `page_size` consecutive tokens
//   slot    one sequence: its last page, the number of pages it holds, and a length
//   length  the number of tokens whose keys and values stand in a slot
//   holder  of a page: a slot that ends in it, or a page in use that follows it
//   in use  said of a page that has a holder, so that some slot has it among its pages
//   cached  said of a page that the prefix cache (prefix_cache.h) keeps, so that another sequence
//           with the same beginning finds it, even when no slot has it any more
//
// Whoever shares a page shares all pages before it, since what stands in a page follows from them.
// So each page follows one other, or none, and pages form trees; a slot's pages are found from its
// last one backwards. A fork adds one holder to one page, however many pages come before it, and a
// release goes back only as far as pages lose their last holder.
//
// Sharing rules; check() verifies them
//   1. A slot's pages are its last one and those that come before it, back to one that follows
//      none. A page's count of holders is the number of slots that end in it and of pages in use
//      that follow it.
//   2. A slot holds at least ceil(length / page_size) pages. Those beyond are reserved ahead and
//      belong to that slot alone.
//   3. A page is written only by a slot that owns it alone: no other slot has it, and it is not
//      cached. One that is shared, and partial in some slot, is that slot's last: only truncate
//      makes such pages, and it gives up what lies beyond. reserve replaces it (copy-on-write);
//      extend and places refuse to run before that. The last slot to rewrite a cached page needs
//      a copy, too.
//   4. A cached page follows the page before it in the cache. So a slot that holds it holds the
//      cached pages before it, too, in the same places.
//   5. A cached page that is not in use counts as free. It is taken when no other is left: the one
//      that has been without a slot longest first, and always before the pages that it follows.
//
// Every operation takes many slots at once and is all-or-nothing: it checks everything first,
// and when it throws, the state is exactly what it was. Free pages and slots are stacks, so the
// same calls give the same pages, and a page just freed is the next one used. An operation that
// throws has evicted nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "prefix_cache.h"

namespace w2s {

// The pool has too few free pages or slots. The caller may release some and try again.
struct OutOfPages : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The call makes no sense in this state: an error of the caller.
struct PageMisuse : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// "Copy the contents of page `source` to page `destination`, before anything else is done with the
// pool." Within the list of one call no page is both a source and a destination, and no page is a
// destination twice: the copies may run in any order.
struct PageCopy {
    std::int32_t source;
    std::int32_t destination;
};

struct ForkResult {
    std::vector<std::int32_t> children;
    std::vector<PageCopy> copies;
};

// What became of the prefix cache so far.
struct CacheStatistics {
    std::int64_t lookups = 0;        // prompts that adopt was asked for
    std::int64_t lookup_tokens = 0;  // tokens of these prompts
    std::int64_t hit_tokens = 0;     // those of them that adopt attached
    std::int64_t evictions = 0;      // cached pages taken for something else
};

class PageManager {
public:
    using Ints = std::span<const std::int32_t>;

    // `hash_bits`: how much of its hashes the prefix cache uses; fewer than 64 are for tests.
    PageManager(std::int64_t num_pages, std::int64_t page_size, std::int64_t max_slots,
                std::int64_t max_pages_per_slot, bool prefix_cache = false, int hash_bits = 64);
    // Views of the columns are handed out; a copy or a move would leave them dangling.
    PageManager(const PageManager&) = delete;
    PageManager& operator=(const PageManager&) = delete;

    // n empty slots, holding no page.
    std::vector<std::int32_t> allocate(std::int64_t n);

    // Makes room for tokens[i] more tokens in slots[i]; afterwards they may be written.
    std::vector<PageCopy> reserve(Ints slots, Ints tokens);

    // Fresh pages that reserve would take, copies included.
    std::int64_t pages_needed(Ints slots, Ints tokens) const;

    // Flat positions page * page_size + offset of the tokens[i] positions that follow the length
    // of slots[i], slot after slot. They must have been reserved.
    std::vector<std::int64_t> places(Ints slots, Ints tokens) const;

    // Counts tokens[i] reserved positions of slots[i] as written.
    void extend(Ints slots, Ints tokens);

    // counts[i] new slots with the tokens of slots[i], grouped by parent. Full pages are shared;
    // a partial last page is copied for each child. Parents keep everything, reserved pages too.
    ForkResult fork(Ints slots, Ints counts);

    // Cuts slots[i] back to lengths[i] tokens and gives up every page beyond them.
    void truncate(Ints slots, Ints lengths);

    // Gives up the pages reserved beyond the length.
    void trim(Ints slots);

    // Gives up the slots, and the pages that nobody else holds.
    void release(Ints slots);

    // The pages of slots[i], in order, reserved ones too, and kNoPage behind them:
    // [slots.size(), the most pages that one of them holds]. A slot may be given twice.
    std::vector<std::int32_t> page_table(Ints slots) const;

    // Writes the pages of a slot in use from the one at `begin` on to `out`: held - begin of them.
    void copy_table(std::int32_t slot, std::int64_t begin, std::int32_t* out) const;

    // Tables that are to be written once, a little later: a long history is named by its runs.
    struct Table {
        struct RunAt {
            std::int32_t at, run;
            std::uint32_t use;
        };
        struct PageAt {
            std::int32_t at, page;
        };
        std::vector<RunAt> runs, long_runs;
        std::vector<PageAt> pages;
    };
    // The pages of slots[i] from the one at begins[i] on; the one at k is to be written to
    // starts[i] + k.
    void append_tables(Ints slots, std::span<const std::int64_t> begins,
                       std::span<const std::int32_t> starts, Table& table) const;
    // Slots may have changed meanwhile. PageMisuse: pages were given back, and others have their
    // place.
    void write_table(const Table& table, std::int32_t* out) const;

    // ---- the prefix cache; with the cache off these find nothing and keep nothing ----
    // `tokens` are token ids of one sequence after the other, counts[i] of the i-th.

    // How many tokens of each sequence stand in cached pages, from its first on. Changes nothing.
    std::vector<std::int32_t> match(Ints tokens, Ints counts) const;

    // Attaches these pages to slots[i], which must be empty: its length is then that number of
    // tokens, a multiple of page_size, which is returned. Takes no page, so it needs no room, but
    // pages that counted as free may no longer do so.
    std::vector<std::int32_t> adopt(Ints slots, Ints tokens, Ints counts);

    // Caches the full pages of the first counts[i] tokens of slots[i], which must be `tokens`.
    // Where the same tokens are cached in another page already, that one stays and the slot keeps
    // its own; its further pages are then not cached, since the page before them in the cache
    // would be one that the slot does not hold. Returns the number of pages that are new in the
    // cache. Throws PageMisuse if a page is cached with other tokens than these.
    std::int64_t remember(Ints slots, Ints tokens, Ints counts);

    // Empties the cache. Slots keep their pages.
    void drop_cache();

    bool prefix_cache() const { return cache_.enabled(); }
    std::int64_t cached_pages() const { return cache_.size(); }
    CacheStatistics cache_statistics() const { return statistics_; }

    // Throws std::logic_error, naming the rule, if the state is inconsistent. Walks everything.
    void check() const;

    std::int64_t num_pages() const { return static_cast<std::int64_t>(pages_.size()); }
    std::int64_t page_size() const { return page_size_; }
    std::int64_t max_slots() const { return static_cast<std::int64_t>(lengths_.size()); }
    std::int64_t max_pages_per_slot() const { return max_pages_per_slot_; }
    // Cached pages that no slot holds are free, too.
    std::int64_t free_pages() const {
        return static_cast<std::int64_t>(free_pages_.size()) + cache_.idle();
    }
    std::int64_t used_pages() const { return num_pages() - free_pages(); }
    std::int64_t free_slots() const { return static_cast<std::int64_t>(free_slots_.size()); }

    // These addresses stay the same for the manager's lifetime.
    // lengths [max_slots]; held [max_slots], pages held, reserved ones too, -1 = free slot;
    // last [max_slots], the last of these pages, kNoPage = none. And of pages, kPageStride numbers
    // from one to the next: before, the page that each follows, of one neither in use nor cached
    // without a meaning; holders.
    const std::int32_t* lengths() const { return lengths_.data(); }
    const std::int32_t* held() const { return held_.data(); }
    const std::int32_t* last() const { return last_.data(); }
    const std::int32_t* before() const { return &pages_.front().before; }
    const std::int32_t* holders() const { return &pages_.front().holders; }
    static constexpr std::int64_t kPageStride = 4;

    static constexpr std::int32_t kNoPage = PrefixCache::kNoPage;

private:
    static constexpr std::int32_t kFree = -1;  // in held_
    static std::string slot_name(std::int32_t slot) { return "slot " + std::to_string(slot); }

    void check_slot(std::int32_t slot) const;
    void check_slots(Ints slots) const;
    void check_amounts(Ints slots, Ints amounts, const char* what) const;
    void check_growth(Ints slots, Ints tokens) const;
    void check_reserved(Ints slots, Ints tokens) const;
    void check_sequences(Ints tokens, Ints counts) const;
    void check_free_pages(std::int64_t wanted) const;
    void check_free_slots(std::int64_t wanted) const;

    std::int32_t take_page();
    void append_page(std::int32_t slot);
    void hold(std::int32_t page);
    void drop(std::int32_t page);
    void shrink(std::int32_t slot, std::int64_t pages);

    // The pages in the cache that a sequence begins with: the last of them, and how many.
    struct Beginning {
        std::int32_t last;
        std::int64_t pages;
    };
    Beginning find_beginning(const std::int32_t* tokens, std::int64_t count) const;

    std::int64_t pages_of(std::int64_t tokens) const {
        return (tokens + page_size_ - 1) / page_size_;
    }
    // The page at an index among those that a slot holds; kNoPage for index -1.
    std::int32_t page_at(std::int32_t slot, std::int64_t index) const;
    bool partial(std::int32_t slot) const { return lengths_[slot] % page_size_ != 0; }
    // A slot's last page, if the next token would go there and tokens of the slot stand there
    // already; else kNoPage. A partial page with others behind it is the slot's own (rule 3).
    std::int32_t page_to_own(std::int32_t slot) const {
        return partial(slot) && held_[slot] == pages_of(lengths_[slot]) ? last_[slot] : kNoPage;
    }
    // Holders, and the cache.
    std::int32_t owners(std::int32_t page) const {
        return pages_[page].holders + cache_.holds(page);
    }

    std::int64_t page_size_;
    std::int64_t max_pages_per_slot_;
    std::vector<std::int32_t> lengths_;
    std::vector<std::int32_t> held_;     // pages held by a slot; kFree for a free slot
    std::vector<std::int32_t> last_;     // of a slot's pages
    // Walking back through a history costs a wait for memory a page. So where its length is a
    // multiple of kRun, the last kRun pages are written down, page after page, when they are first
    // walked: what a page follows stays what it is as long as the page is in use. A run that
    // follows another one names it, so that there is one wait a run. And where the length is a
    // multiple of kLongRun, the last kLongRun pages are written down once more, as a long run, and
    // so that there is one wait a long run, the run before it is known, too.
    static constexpr std::int64_t kRun = 16, kLongRun = 64;
    static constexpr std::int32_t kNoRun = -1;
    // The way back goes from run to run, so these lie close together, and their pages elsewhere.
    struct Run {
        std::int32_t before;           // in runs_; kNoRun: nobody has walked there yet
        std::uint32_t use = 0;         // as which the pages are written down here
        std::int32_t longer = kNoRun;  // in long_pages_, the long run that ends here, if any
        std::int32_t beyond = kNoRun;  // in runs_, the run before the long one, if any
    };
    // The way back through the pages of a slot, of which those from `begin` to `end` are left.
    struct Way {
        std::int64_t begin, end;
        std::int64_t at;    // the place of page 0 in a table, or where it would be
        std::int32_t last;  // of those that are left: a page, or in runs_ a run
        bool in_runs;

        std::int64_t left() const { return end - begin; }
    };
    Way way_back(std::int32_t slot, std::int64_t begin, std::int64_t at) const;
    template <typename OnPage, typename OnRun, typename OnLongRun>
    void step(Way& way, OnPage on_page, OnRun on_run, OnLongRun on_long_run) const;
    void copy_run(std::int32_t run, std::int32_t* out) const;
    void copy_long_run(std::int32_t run, std::int32_t* out) const;
    std::int32_t run_up_to(std::int32_t page) const;  // in runs_
    std::int32_t run_before(std::int32_t run) const;
    void write_down_long(std::int32_t run, std::int64_t end) const;
    void forget_run(std::int32_t run);
    mutable std::vector<Run> runs_;
    struct alignas(kRun * sizeof(std::int32_t)) RunPages {  // a line of the cache
        std::array<std::int32_t, kRun> pages;
    };
    struct alignas(kRun * sizeof(std::int32_t)) LongRunPages {
        std::array<std::int32_t, kLongRun> pages;
    };
    mutable std::vector<RunPages> run_pages_;  // of each of them
    mutable std::vector<LongRunPages> long_pages_;
    mutable std::vector<std::int32_t> free_runs_, free_long_;

    // Pages come in any order, so what is known of one lies together: one wait for memory a page.
    struct Page {
        std::int32_t before = kNoPage;  // the page that it follows
        std::int32_t holders = 0;
        mutable std::int32_t run = kNoRun;  // up to here, in runs_
        mutable std::int32_t leaving = 0;   // scratch of pages_needed, 0 between calls
    };
    static_assert(sizeof(Page) == kPageStride * sizeof(std::int32_t));
    std::vector<Page> pages_;
    std::vector<std::int32_t> free_pages_;  // without those of the cache
    std::vector<std::int32_t> free_slots_;
    PrefixCache cache_;
    CacheStatistics statistics_;

    // Scratch, so that checks allocate nothing: the slots of the current call, by its number.
    mutable std::vector<std::uint64_t> seen_;
    mutable std::uint64_t call_ = 0;
};

}  // namespace w2s
