#include "page_manager.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

namespace w2s {
namespace {

std::int64_t positive(std::int64_t value, const char* name) {
    if (value < 1 || value > std::numeric_limits<std::int32_t>::max()) {
        throw PageMisuse(std::string(name) + " must be between 1 and 2**31 - 1, not " +
                         std::to_string(value));
    }
    return value;
}

int checked_hash_bits(int bits) {
    if (bits < 0 || bits > 64) {
        throw PageMisuse("hash_bits must be between 0 and 64, not " + std::to_string(bits));
    }
    return bits;
}

// A stack of 0..n-1 whose top is 0.
std::vector<std::int32_t> descending(std::int64_t n) {
    std::vector<std::int32_t> stack(static_cast<std::size_t>(n));
    std::iota(stack.rbegin(), stack.rend(), 0);
    return stack;
}

}  // namespace

PageManager::PageManager(std::int64_t num_pages, std::int64_t page_size, std::int64_t max_slots,
                         std::int64_t max_pages_per_slot, bool prefix_cache, int hash_bits)
    : page_size_(positive(page_size, "page_size")),
      max_pages_per_slot_(positive(max_pages_per_slot, "max_pages_per_slot")),
      cache_(positive(num_pages, "num_pages"), page_size, prefix_cache,
             checked_hash_bits(hash_bits)) {
    positive(max_slots, "max_slots");
    // Lengths are int32.
    positive(page_size * max_pages_per_slot, "page_size * max_pages_per_slot");
    lengths_.assign(static_cast<std::size_t>(max_slots), 0);
    held_.assign(static_cast<std::size_t>(max_slots), kFree);
    last_.assign(static_cast<std::size_t>(max_slots), kNoPage);
    pages_.assign(static_cast<std::size_t>(num_pages), {});
    free_pages_ = descending(num_pages);
    free_slots_ = descending(max_slots);
    seen_.assign(static_cast<std::size_t>(max_slots), 0);
}

// ---- checks: none of these changes the visible state ----

void PageManager::check_slot(std::int32_t slot) const {
    if (slot < 0 || slot >= max_slots()) {
        throw PageMisuse(slot_name(slot) + " does not exist: the pool has " +
                         std::to_string(max_slots()) + " slots");
    }
    if (held_[slot] == kFree) throw PageMisuse(slot_name(slot) + " is free");
}

void PageManager::check_slots(Ints slots) const {
    ++call_;
    for (const std::int32_t slot : slots) {
        check_slot(slot);
        // Whoever asks looks at the last pages next, one after the other, and these lie anywhere.
        if (last_[slot] != kNoPage) __builtin_prefetch(&pages_[last_[slot]]);
        if (seen_[slot] == call_) throw PageMisuse(slot_name(slot) + " is given twice");
        seen_[slot] = call_;
    }
}

void PageManager::check_amounts(Ints slots, Ints amounts, const char* what) const {
    if (slots.size() != amounts.size()) {
        throw PageMisuse(std::to_string(slots.size()) + " slots but " +
                         std::to_string(amounts.size()) + " " + what);
    }
    check_slots(slots);
    for (std::size_t i = 0; i < slots.size(); ++i) {
        if (amounts[i] < 0) {
            throw PageMisuse("negative " + std::string(what) + " (" + std::to_string(amounts[i]) +
                             ") for " + slot_name(slots[i]));
        }
    }
}

void PageManager::check_growth(Ints slots, Ints tokens) const {
    check_amounts(slots, tokens, "tokens");
    const std::int64_t room = max_pages_per_slot_ * page_size_;
    for (std::size_t i = 0; i < slots.size(); ++i) {
        const std::int64_t wanted = std::int64_t{lengths_[slots[i]]} + tokens[i];
        if (wanted > room) {
            throw PageMisuse(slot_name(slots[i]) + " would have " + std::to_string(wanted) +
                             " tokens; a slot holds at most " + std::to_string(room));
        }
    }
}

void PageManager::check_reserved(Ints slots, Ints tokens) const {
    check_growth(slots, tokens);
    for (std::size_t i = 0; i < slots.size(); ++i) {
        const std::int32_t slot = slots[i];
        if (tokens[i] == 0) continue;
        const std::int64_t wanted = std::int64_t{lengths_[slot]} + tokens[i];
        if (pages_of(wanted) > held_[slot]) {
            throw PageMisuse(slot_name(slot) + " has no page reserved for " +
                             std::to_string(wanted) + " tokens: reserve first");
        }
        if (const std::int32_t page = page_to_own(slot); page != kNoPage && owners(page) > 1) {
            throw PageMisuse("the last page of " + slot_name(slot) +
                             " is shared and must not be written: reserve first");
        }
    }
}

void PageManager::check_sequences(Ints tokens, Ints counts) const {
    std::int64_t sum = 0;
    for (const std::int32_t count : counts) {
        if (count < 0) throw PageMisuse("negative token count " + std::to_string(count));
        sum += count;
    }
    if (sum != static_cast<std::int64_t>(tokens.size())) {
        throw PageMisuse(std::to_string(tokens.size()) + " tokens given, but the counts sum to " +
                         std::to_string(sum));
    }
}

void PageManager::check_free_pages(std::int64_t wanted) const {
    if (wanted > free_pages()) {
        throw OutOfPages(std::to_string(wanted) + " pages wanted, " +
                         std::to_string(free_pages()) + " free of " +
                         std::to_string(num_pages()));
    }
}

void PageManager::check_free_slots(std::int64_t wanted) const {
    if (wanted > free_slots()) {
        throw OutOfPages(std::to_string(wanted) + " slots wanted, " +
                         std::to_string(free_slots()) + " free of " +
                         std::to_string(max_slots()));
    }
}

// ---- pages in and out ----

std::int32_t PageManager::take_page() {
    if (free_pages_.empty()) {
        ++statistics_.evictions;
        return cache_.evict();
    }
    const std::int32_t page = free_pages_.back();
    free_pages_.pop_back();
    return page;
}

// The page before it keeps its number of holders: the slot no longer ends there, but here.
void PageManager::append_page(std::int32_t slot) {
    const std::int32_t page = take_page();
    if (pages_[page].run != kNoRun) {  // what it followed when it was in use before
        forget_run(pages_[page].run);
        pages_[page].run = kNoRun;
    }
    pages_[page].before = last_[slot];
    pages_[page].holders = 1;
    last_[slot] = page;
    ++held_[slot];
}

// One more holder. A page that had none holds the one before it from now on.
void PageManager::hold(std::int32_t page) {
    for (; page != kNoPage && pages_[page].holders++ == 0; page = pages_[page].before) {
        if (cache_.holds(page)) cache_.mark_in_use(page);
    }
}

// One holder less. A page that has none left lets go of the one before it. The last page goes
// first, so that the next slot to grow gets them back in ascending order.
// Cannot throw: the stack keeps the capacity for all pages that it started with.
void PageManager::drop(std::int32_t page) {
    for (; page != kNoPage && --pages_[page].holders == 0; page = pages_[page].before) {
        if (cache_.holds(page)) {
            cache_.mark_idle(page);
        } else {
            free_pages_.push_back(page);
        }
    }
}

void PageManager::shrink(std::int32_t slot, std::int64_t pages) {
    if (held_[slot] <= pages) return;
    const std::int32_t last = last_[slot];
    last_[slot] = page_at(slot, pages - 1);
    held_[slot] = static_cast<std::int32_t>(pages);
    hold(last_[slot]);  // first, so that the slot never lets go of it
    drop(last);
}

std::int32_t PageManager::page_at(std::int32_t slot, std::int64_t index) const {
    std::int32_t page = last_[slot];
    for (std::int64_t i = held_[slot]; i-- > index + 1;) page = pages_[page].before;
    return page;
}

// ---- operations ----

std::vector<std::int32_t> PageManager::allocate(std::int64_t n) {
    if (n < 0) throw PageMisuse("cannot allocate " + std::to_string(n) + " slots");
    check_free_slots(n);
    std::vector<std::int32_t> slots(free_slots_.rbegin(), free_slots_.rbegin() + n);
    free_slots_.resize(free_slots_.size() - static_cast<std::size_t>(n));
    for (const std::int32_t slot : slots) held_[slot] = 0;
    return slots;
}

std::int64_t PageManager::pages_needed(Ints slots, Ints tokens) const {
    check_growth(slots, tokens);
    std::int64_t needed = 0;
    for (std::size_t i = 0; i < slots.size(); ++i) {
        if (tokens[i] == 0) continue;
        const std::int32_t slot = slots[i];
        needed += std::max<std::int64_t>(
            0, pages_of(std::int64_t{lengths_[slot]} + tokens[i]) - held_[slot]);
        // When all owners of a page are in this call, the last of them can keep it.
        if (const std::int32_t page = page_to_own(slot);
            page != kNoPage && owners(page) - pages_[page].leaving > 1) {
            ++pages_[page].leaving;
            ++needed;
        }
    }
    for (const std::int32_t slot : slots) {
        if (last_[slot] != kNoPage) pages_[last_[slot]].leaving = 0;
    }
    return needed;
}

std::vector<PageCopy> PageManager::reserve(Ints slots, Ints tokens) {
    check_free_pages(pages_needed(slots, tokens));
    std::vector<PageCopy> copies;
    copies.reserve(slots.size());  // Nothing may throw once the state changes.
    for (std::size_t i = 0; i < slots.size(); ++i) {
        if (tokens[i] == 0) continue;
        const std::int32_t slot = slots[i];
        if (const std::int32_t page = page_to_own(slot); page != kNoPage && owners(page) > 1) {
            last_[slot] = pages_[page].before;
            --held_[slot];
            hold(last_[slot]);
            append_page(slot);
            drop(page);
            copies.push_back({page, last_[slot]});
        }
        const std::int64_t wanted = pages_of(std::int64_t{lengths_[slot]} + tokens[i]);
        while (held_[slot] < wanted) append_page(slot);
    }
    return copies;
}

std::vector<std::int64_t> PageManager::places(Ints slots, Ints tokens) const {
    check_reserved(slots, tokens);
    std::vector<std::int64_t> positions(static_cast<std::size_t>(
        std::accumulate(tokens.begin(), tokens.end(), std::int64_t{0})));
    auto end = positions.begin();
    for (std::size_t i = 0; i < slots.size(); ++i) {
        if (tokens[i] == 0) continue;
        // From the last one backwards, as pages are found.
        const std::int64_t begin = lengths_[slots[i]];
        std::int64_t position = begin + tokens[i] - 1;
        std::int32_t page = page_at(slots[i], position / page_size_);
        end += tokens[i];
        for (auto next = end; position >= begin; --position) {
            const std::int64_t offset = position % page_size_;
            *--next = page * page_size_ + offset;
            if (offset == 0) page = pages_[page].before;
        }
    }
    return positions;
}

void PageManager::extend(Ints slots, Ints tokens) {
    check_reserved(slots, tokens);
    for (std::size_t i = 0; i < slots.size(); ++i) lengths_[slots[i]] += tokens[i];
}

ForkResult PageManager::fork(Ints slots, Ints counts) {
    check_amounts(slots, counts, "counts");
    std::int64_t children = 0;
    std::int64_t copied_pages = 0;
    for (std::size_t i = 0; i < slots.size(); ++i) {
        children += counts[i];
        if (partial(slots[i])) copied_pages += counts[i];
    }
    check_free_slots(children);
    check_free_pages(copied_pages);
    std::vector<PageCopy> copies;
    copies.reserve(static_cast<std::size_t>(copied_pages));
    ForkResult result{allocate(children), std::move(copies)};

    auto child = result.children.cbegin();
    for (std::size_t i = 0; i < slots.size(); ++i) {
        const std::int32_t length = lengths_[slots[i]];
        const std::int64_t full = length / page_size_;
        const std::int32_t shared = page_at(slots[i], full - 1);
        const std::int32_t source = partial(slots[i]) ? page_at(slots[i], full) : kNoPage;
        for (const auto last = child + counts[i]; child != last; ++child) {
            lengths_[*child] = length;
            held_[*child] = static_cast<std::int32_t>(full);
            last_[*child] = shared;
            hold(shared);
            if (source == kNoPage) continue;
            append_page(*child);
            result.copies.push_back({source, last_[*child]});
        }
    }
    return result;
}

void PageManager::truncate(Ints slots, Ints lengths) {
    check_amounts(slots, lengths, "lengths");
    for (std::size_t i = 0; i < slots.size(); ++i) {
        if (lengths[i] > lengths_[slots[i]]) {
            throw PageMisuse("cannot truncate " + slot_name(slots[i]) + " from " +
                             std::to_string(lengths_[slots[i]]) + " to " +
                             std::to_string(lengths[i]) + " tokens");
        }
    }
    for (std::size_t i = 0; i < slots.size(); ++i) {
        lengths_[slots[i]] = lengths[i];
        shrink(slots[i], pages_of(lengths[i]));
    }
}

void PageManager::trim(Ints slots) {
    check_slots(slots);
    for (const std::int32_t slot : slots) shrink(slot, pages_of(lengths_[slot]));
}

void PageManager::release(Ints slots) {
    check_slots(slots);
    for (const std::int32_t slot : slots) {
        drop(last_[slot]);
        last_[slot] = kNoPage;
        lengths_[slot] = 0;
        held_[slot] = kFree;
        free_slots_.push_back(slot);
    }
}

// ---- the prefix cache ----

PageManager::Beginning PageManager::find_beginning(const std::int32_t* tokens,
                                                   std::int64_t count) const {
    Beginning found{kNoPage, 0};
    for (; found.pages < count / page_size_; ++found.pages) {
        const std::int32_t* const next = tokens + found.pages * page_size_;
        const std::int32_t page = cache_.find(cache_.key(found.last, next));
        if (page == kNoPage) break;
        found.last = page;
    }
    return found;
}

std::vector<std::int32_t> PageManager::match(Ints tokens, Ints counts) const {
    check_sequences(tokens, counts);
    std::vector<std::int32_t> matched;
    matched.reserve(counts.size());
    const std::int32_t* next = tokens.data();
    for (const std::int32_t count : counts) {
        const std::int64_t found = find_beginning(next, count).pages;
        matched.push_back(static_cast<std::int32_t>(found * page_size_));
        next += count;
    }
    return matched;
}

std::vector<std::int32_t> PageManager::adopt(Ints slots, Ints tokens, Ints counts) {
    check_amounts(slots, counts, "token counts");
    check_sequences(tokens, counts);
    for (const std::int32_t slot : slots) {
        if (held_[slot] != 0) {
            throw PageMisuse(slot_name(slot) + " holds pages already: only an empty slot adopts");
        }
    }
    std::vector<std::int32_t> adopted(slots.size(), 0);
    if (!cache_.enabled()) return adopted;
    const std::int32_t* next = tokens.data();
    for (std::size_t i = 0; i < slots.size(); ++i) {
        const std::int32_t slot = slots[i];
        // Not too many for a slot: the pages stood in the same places of another one.
        const auto [last, pages] = find_beginning(next, counts[i]);
        hold(last);
        last_[slot] = last;
        held_[slot] = static_cast<std::int32_t>(pages);
        lengths_[slot] = adopted[i] = static_cast<std::int32_t>(pages * page_size_);
        ++statistics_.lookups;
        statistics_.lookup_tokens += counts[i];
        statistics_.hit_tokens += adopted[i];
        next += counts[i];
    }
    return adopted;
}

std::int64_t PageManager::remember(Ints slots, Ints tokens, Ints counts) {
    check_amounts(slots, counts, "token counts");
    check_sequences(tokens, counts);
    std::int64_t most = 0;
    std::int32_t longest = 0;
    for (std::size_t i = 0; i < slots.size(); ++i) {
        if (counts[i] > lengths_[slots[i]]) {
            throw PageMisuse("cannot remember " + std::to_string(counts[i]) + " tokens of " +
                             slot_name(slots[i]) + ", which has " +
                             std::to_string(lengths_[slots[i]]));
        }
        most += counts[i] / page_size_;
        longest = std::max(longest, held_[slots[i]]);
    }
    if (!cache_.enabled()) return 0;
    std::vector<std::int32_t> added;
    added.reserve(static_cast<std::size_t>(most));
    std::vector<std::int32_t> pages(static_cast<std::size_t>(longest));
    const std::int32_t* next = tokens.data();
    for (std::size_t i = 0; i < slots.size(); ++i) {
        copy_table(slots[i], 0, pages.data());
        std::int32_t parent = kNoPage;
        for (std::int64_t k = 0; k < counts[i] / page_size_; ++k) {
            const std::int32_t page = pages[static_cast<std::size_t>(k)];
            const PrefixCache::Key key = cache_.key(parent, next + k * page_size_);
            parent = page;
            const std::int32_t known = cache_.find(key);
            if (known == page) continue;
            if (cache_.holds(page)) {
                for (const std::int32_t taken_back : added) cache_.erase(taken_back);
                throw PageMisuse("page " + std::to_string(k) + " of " + slot_name(slots[i]) +
                                 " is cached with other tokens than these");
            }
            if (known != kNoPage) break;
            cache_.insert(key, page);
            added.push_back(page);
        }
        next += counts[i];
    }
    return static_cast<std::int64_t>(added.size());
}

void PageManager::drop_cache() {
    for (auto page = static_cast<std::int32_t>(num_pages()); page-- > 0;) {
        if (cache_.holds(page) && pages_[page].holders == 0) free_pages_.push_back(page);
    }
    cache_.clear();
}

}  // namespace w2s
