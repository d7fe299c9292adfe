#include "prefix_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

namespace w2s {
namespace {

// 2**64 divided by the golden ratio: odd, and without a pattern in its bits.
constexpr std::uint64_t kMultiplier = 0x9E3779B97F4A7C15;

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
    hash = (hash ^ value) * kMultiplier;
    return hash ^ (hash >> 32);
}

// Two tokens at a time: a step waits for the multiplication of the one before.
std::uint64_t hash_page(std::uint64_t hash, const std::int32_t* tokens, std::int64_t n) {
    hash = mix(hash, static_cast<std::uint64_t>(n));
    for (; n >= 2; n -= 2, tokens += 2) {
        std::uint64_t pair;
        std::memcpy(&pair, tokens, sizeof(pair));
        hash = mix(hash, pair);
    }
    if (n == 1) hash = mix(hash, static_cast<std::uint32_t>(*tokens));
    return mix(hash, 0);
}

}  // namespace

PrefixCache::PrefixCache(std::int64_t num_pages, std::int64_t page_size, bool enabled,
                         int hash_bits)
    : enabled_(enabled),
      page_size_(page_size),
      hash_mask_(hash_bits < 64 ? (std::uint64_t{1} << hash_bits) - 1 : ~std::uint64_t{0}),
      cached_(static_cast<std::size_t>(num_pages), 0) {
    if (!enabled) return;
    const auto pages = static_cast<std::size_t>(num_pages);
    entries_.resize(pages + 1);
    tokens_.resize(pages * static_cast<std::size_t>(page_size));
    buckets_.assign(std::bit_ceil(pages), kNoPage);
    clear();
}

PrefixCache::Key PrefixCache::key(std::int32_t parent, const std::int32_t* tokens) const {
    const std::uint64_t before = parent == kNoPage ? 0 : entries_[parent].hash;
    return {parent, tokens, hash_page(before, tokens, page_size_) & hash_mask_};
}

std::int32_t PrefixCache::find(const Key& key) const {
    if (!enabled_) return kNoPage;
    for (std::int32_t page = bucket(key.hash); page != kNoPage; page = entries_[page].next) {
        const Entry& entry = entries_[page];
        if (entry.hash == key.hash && entry.parent == key.parent &&
            std::equal(key.tokens, key.tokens + page_size_, tokens(page))) {
            return page;
        }
    }
    return kNoPage;
}

void PrefixCache::insert(const Key& key, std::int32_t page) {
    std::int32_t& first = bucket(key.hash);
    entries_[page] = {key.hash, key.parent, first, kNoPage, kNoPage};
    first = page;
    std::copy_n(key.tokens, page_size_, tokens_.begin() + page * page_size_);
    cached_[page] = 1;
    ++size_;
}

void PrefixCache::erase(std::int32_t page) {
    std::int32_t* link = &bucket(entries_[page].hash);
    while (*link != page) link = &entries_[*link].next;
    *link = entries_[page].next;
    cached_[page] = 0;
    --size_;
}

void PrefixCache::mark_idle(std::int32_t page) {
    const std::int32_t newest = entries_[ring()].older;
    entries_[page].older = newest;
    entries_[page].newer = ring();
    entries_[newest].newer = page;
    entries_[ring()].older = page;
    ++idle_;
}

void PrefixCache::mark_in_use(std::int32_t page) {
    const Entry& entry = entries_[page];
    entries_[entry.older].newer = entry.newer;
    entries_[entry.newer].older = entry.older;
    --idle_;
}

std::int32_t PrefixCache::evict() {
    const std::int32_t oldest = entries_[ring()].newer;
    mark_in_use(oldest);
    erase(oldest);
    return oldest;
}

void PrefixCache::clear() {
    if (!enabled_) return;
    std::ranges::fill(cached_, 0);
    std::ranges::fill(buckets_, kNoPage);
    entries_[ring()].older = entries_[ring()].newer = ring();
    size_ = idle_ = 0;
}

void PrefixCache::check(std::span<const std::int32_t> holders) const {
    const auto expect = [](bool holds, const char* rule) {
        if (!holds) throw std::logic_error(std::string("broken prefix cache: ") + rule);
    };
    const std::int64_t cached = std::ranges::count_if(cached_, [](char flag) { return flag != 0; });
    expect(cached == size_, "the number of cached pages is wrong");
    if (!enabled_) {
        expect(size_ == 0 && idle_ == 0, "a page is cached though the cache is off");
        return;
    }
    std::int64_t found = 0;
    for (std::size_t i = 0; i < buckets_.size(); ++i) {
        for (std::int32_t page = buckets_[i]; page != kNoPage; page = entries_[page].next) {
            expect(holds(page) && ++found <= size_, "a bucket names a page that is not cached");
            expect((entries_[page].hash & (buckets_.size() - 1)) == i,
                   "a page stands in the wrong bucket");
        }
    }
    expect(found == size_, "a cached page stands in no bucket");

    std::int64_t alone = 0;
    for (std::int32_t page = 0; page < ring(); ++page) {
        if (!holds(page)) continue;
        const std::int32_t before = parent(page);
        expect(before == kNoPage || holds(before), "the parent of a cached page is not cached");
        expect(before == kNoPage || holders[before] > 0 || holders[page] == 0,
               "a slot holds a cached page without its parent");
        const Key own = key(before, tokens(page));
        expect(own.hash == entries_[page].hash && find(own) == page,
               "a cached page is not found by its tokens");
        if (holders[page] == 0) ++alone;
    }
    expect(alone == idle_, "the number of idle pages is wrong");

    std::vector<bool> listed(cached_.size(), false);
    std::int64_t length = 0;
    std::int32_t older = ring();
    for (std::int32_t page = entries_[ring()].newer; page != ring(); page = entries_[page].newer) {
        expect(++length <= idle_ && holds(page) && holders[page] == 0,
               "the idle list names a page in use");
        expect(entries_[page].older == older, "the idle list differs backwards");
        const std::int32_t before = parent(page);
        expect(before == kNoPage || !listed[before], "a page would be evicted before its child");
        listed[page] = true;
        older = page;
    }
    expect(length == idle_ && entries_[ring()].older == older, "the idle list misses a page");
}

}  // namespace w2s
