// The prefix cache: which page holds the keys and values of which beginning of a prompt.
//
// It is the part of PageManager that finds a full page again by what stands in it. It sees tokens
// and page numbers only; who holds a page, and which are free, stays with the manager.
//
// Terms
//   entry   a cached page: its tokens, and the cached page that the sequence has before it
//   parent  that page before it; kNoPage for the first page of a sequence
//   idle    cached, and held by no slot: its page may be taken for something else
//
// A page is found by a hash chained over the pages before it, as in vLLM's automatic prefix
// caching; its tokens and its parent are then compared, so a collision costs time and never gives
// a wrong page.
//
// Idle entries stand in a list in the order in which their last slot let go of them, and are
// evicted from its old end. PageManager keeps to it that a slot with a page of an entry also has
// the pages of all entries before it, and that it lets go of its last page first. So an entry
// becomes idle after its children, and the one at the old end has none: chains are eaten from
// their ends, and what is left of them can be found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace w2s {

class PrefixCache {
public:
    static constexpr std::int32_t kNoPage = -1;

    // What an entry is found by. `tokens` points to the page_size tokens of the page.
    struct Key {
        std::int32_t parent;
        const std::int32_t* tokens;
        std::uint64_t hash;
    };

    // Only the lowest `hash_bits` bits of hashes are used: tests make them collide. A cache that
    // is not enabled finds nothing and must not be given anything.
    PrefixCache(std::int64_t num_pages, std::int64_t page_size, bool enabled, int hash_bits);

    bool enabled() const { return enabled_; }
    bool holds(std::int32_t page) const { return cached_[page] != 0; }
    std::int64_t size() const { return size_; }
    std::int64_t idle() const { return idle_; }

    // `parent` must be cached, or kNoPage.
    Key key(std::int32_t parent, const std::int32_t* tokens) const;

    // The page cached under the key, or kNoPage.
    std::int32_t find(const Key& key) const;

    // Caches a page that a slot holds. Neither the page nor the key may be cached yet.
    void insert(const Key& key, std::int32_t page);

    // Takes back an insert. The page must be in use by a slot, and its children must go with it.
    void erase(std::int32_t page);

    // The last slot let go of a cached page; a slot holds an idle page again.
    void mark_idle(std::int32_t page);
    void mark_in_use(std::int32_t page);

    // Forgets the entry that has been idle longest and returns its page. There must be one.
    std::int32_t evict();

    void clear();

    // Throws std::logic_error, naming the rule, if table and list are inconsistent in themselves,
    // or with the number of holders of each page (page_manager.h).
    void check(std::span<const std::int32_t> holders) const;
    std::int32_t parent(std::int32_t page) const { return entries_[page].parent; }

private:
    struct Entry {
        std::uint64_t hash;
        std::int32_t parent;
        std::int32_t next;   // in the bucket
        std::int32_t older;  // neighbours in the list of idle entries
        std::int32_t newer;
    };

    std::int32_t& bucket(std::uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
    std::int32_t bucket(std::uint64_t hash) const { return buckets_[hash & (buckets_.size() - 1)]; }
    const std::int32_t* tokens(std::int32_t page) const {
        return tokens_.data() + page * page_size_;
    }
    // The list is a ring through this element, which is no page: its `newer` is the oldest entry.
    std::int32_t ring() const { return static_cast<std::int32_t>(entries_.size()) - 1; }

    bool enabled_;
    std::int64_t page_size_;
    std::uint64_t hash_mask_;
    std::int64_t size_ = 0;
    std::int64_t idle_ = 0;
    std::vector<char> cached_;           // [num_pages]
    std::vector<Entry> entries_;         // [num_pages + 1], by page
    std::vector<std::int32_t> tokens_;   // [num_pages, page_size]
    std::vector<std::int32_t> buckets_;  // first page of each; a power of two of them
};

}  // namespace w2s
