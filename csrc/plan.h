// One forward pass as the attention kernels read it: which pages its rows have, where their new
// tokens go, and how the keys that rows share are cut into splits. The kernels' side of it is in
// kernels/paged_attention.py.
//
// All of it lies in one buffer, so that one copy brings it to a device. The buffer may have room
// for more rows, tokens, splits and pages than the pass has, as that of a recording has. What is
// spare belongs to nobody: it reads no key, and is written nowhere.
//
// The rows' tables of pages are ragged. A row's begins with the first page that anyone reads by it:
// that of its own keys, or of the first split that is found by it. So what rows share stands in the
// table of one of them, and is copied once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "page_manager.h"

namespace w2s {

// What neighbouring rows share: the columns of w2s_fast/attention/row_tree.py. The segments of a row,
// in their order, cover its positions 0 : own without gaps.
struct RowTree {
    using Ints = std::span<const std::int32_t>;
    // Of each segment: its rows first : first + count, and their positions begin : end.
    Ints first, count, begin, end;
    // Where each row's own keys begin; empty if there is no segment.
    Ints own;
};

// What a buffer has room for; and what a pass needs.
struct PassShape {
    std::int64_t rows = 0;
    std::int64_t tokens = 0;
    std::int64_t splits = 0;
    std::int64_t pages = 0;  // entries of all tables
};

// What a pass needs room for, and what bounds its launches; Bounds in w2s_fast/attention/kernel.py.
struct PassBounds {
    std::int64_t rows, tokens, splits, pages, max_q, max_k, max_own, max_tokens, max_parts;
};

// The fields of a buffer. S rows, T tokens, N splits, P pages.
enum class PassField {
    kPositions,   // int64 [T], each token's position in its row
    kWrite,       // int64 [T], where its keys and values go: page * page_size + offset, or -1
    kStride,      // int64 [T], 1 for a token of a row, 0 for a spare one
    kPageTable,   // int32 [P], one row's table behind the other; what is spare is not written
    kTableStart,  // int32 [S], where entry 0 of each row is, or would be
    kLengths,     // int32 [S], tokens of each row, new ones included
    kStarts,      // int32 [S + 1], where each row's new tokens begin
    kOwn,         // int32 [S], where each row's own keys begin
    kParts,       // int32 [S], how many splits the row's segments have
    kTokenRows,   // int32 [T], the row of each token
    kSplits,      // int32 [N, 6], see SharedSegments
    kCount
};

// Slots may change as soon as it is made; pages that they had then may not be given back before it
// is written. It refers to the manager.
class PassLayout {
public:
    using Ints = std::span<const std::int32_t>;
    // In bytes, from the buffer's beginning; negative: that field is left out.
    using Offsets = std::span<const std::int64_t>;

    // counts[i] new tokens of slots[i]; the room for them is reserved, and they do not count yet.
    //
    // split_keys: the most keys of a split. split_queries: a row of more new tokens shares nothing,
    // and its keys are not cut. ahead: how many passes of one token a row follow.
    // Throws PageMisuse if the slots make no sense, or the tree is not one of these rows.
    PassLayout(const PageManager& pages, Ints slots, Ints counts, const RowTree& tree,
               std::int64_t split_keys, std::int64_t split_queries, std::int64_t ahead);

    const PassShape& shape() const { return shape_; }
    // The most new tokens of a row; the most keys of one, in the last of the passes ahead.
    std::int64_t max_q() const { return max_q_; }
    std::int64_t max_k() const { return max_k_; }
    // The most keys outside of segments, likewise, of a row whose keys are cut; 0 if there is none.
    std::int64_t max_own() const { return max_own_; }
    // The most tokens of a split, and the most splits of a row.
    std::int64_t max_tokens() const { return max_tokens_; }
    std::int64_t max_parts() const { return max_parts_; }
    PassBounds bounds() const {
        return {shape_.rows, shape_.tokens, shape_.splits, shape_.pages, max_q_,
                max_k_,      max_own_,      max_tokens_,   max_parts_};
    }

    // Fills a buffer with room for `room`. back: rows stand one token behind, for a step that
    // begins by moving on; kWrite is then of no use.
    // Throws PageMisuse if the pass does not fit, or a field lies outside or at an odd address.
    void write(std::span<std::byte> buffer, Offsets offsets, const PassShape& room,
               bool back) const;

private:
    // Keys that some rows read together, from which splits are cut when they are written: however
    // long a history is, it is one of these.
    struct Span {
        std::int32_t first_token, tokens, begin, end, table_row, first_part;
    };

    void check(const RowTree& tree) const;
    void cut(const RowTree& tree, std::int64_t split_queries);
    void take_tables(const PageManager& pages, Ints slots);
    std::int32_t* write_splits(std::int32_t* out) const;

    std::vector<std::int32_t> old_;     // tokens of each row before the pass
    std::vector<std::int32_t> starts_;  // where its new tokens begin, and the end
    std::vector<std::int64_t> places_;
    std::vector<std::int32_t> own_;
    std::vector<std::int32_t> parts_;
    std::int64_t split_keys_;
    std::vector<Span> spans_;
    std::vector<Span> rests_;  // their last splits, where these are shorter; longest first
    const PageManager* pages_;
    PageManager::Table table_;
    std::vector<std::int32_t> table_start_;
    PassShape shape_;
    std::int64_t max_q_ = 0;
    std::int64_t max_k_ = 0;
    std::int64_t max_own_ = 0;
    std::int64_t max_tokens_ = 0;
    std::int64_t max_parts_ = 0;
};

}  // namespace w2s
