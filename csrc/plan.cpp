#include "plan.h"

#include <algorithm>
#include <functional>
#include <string>

#include "fields.h"

namespace w2s {
namespace {

template <typename T>
T* field(std::span<std::byte> buffer, PassLayout::Offsets offsets, PassField which,
         std::int64_t size) {
    return field_of<T>(buffer, offsets[static_cast<std::size_t>(which)], size);
}

}  // namespace

PassLayout::PassLayout(const PageManager& pages, Ints slots, Ints counts, const RowTree& tree,
                       std::int64_t split_keys, std::int64_t split_queries, std::int64_t ahead)
    : places_(pages.places(slots, counts)),  // it checks slots and counts
      split_keys_(split_keys),
      pages_(&pages) {
    if (split_keys < 1) throw PageMisuse("a split has at least one key");
    const std::size_t rows = slots.size();
    old_.reserve(rows);
    starts_.reserve(rows + 1);
    starts_.push_back(0);
    for (std::size_t i = 0; i < rows; ++i) {
        old_.push_back(pages.lengths()[slots[i]]);
        starts_.push_back(starts_.back() + counts[i]);
        max_q_ = std::max<std::int64_t>(max_q_, counts[i]);
        max_k_ = std::max<std::int64_t>(max_k_, std::int64_t{old_[i]} + counts[i] + ahead);
    }
    own_.assign(rows, 0);
    parts_.assign(rows, 0);
    check(tree);
    cut(tree, split_queries);
    take_tables(pages, slots);
    for (std::size_t i = 0; i < rows; ++i) {
        if (counts[i] > split_queries) continue;
        const std::int64_t own = std::int64_t{old_[i]} + counts[i] - own_[i] + ahead;
        max_own_ = std::max(max_own_, own);
    }
    shape_.rows = static_cast<std::int64_t>(rows);
    shape_.tokens = static_cast<std::int64_t>(places_.size());
}

void PassLayout::check(const RowTree& tree) const {
    const std::size_t segments = tree.first.size();
    const auto expect = [](bool holds, const char* rule) {
        if (!holds) throw PageMisuse(std::string("not a tree of these rows: ") + rule);
    };
    expect(tree.count.size() == segments && tree.begin.size() == segments &&
               tree.end.size() == segments,
           "its columns differ in length");
    expect(tree.own.size() == old_.size() || (tree.own.empty() && segments == 0),
           "it is one of another number of rows");
    const auto rows = static_cast<std::int64_t>(old_.size());
    std::vector<std::int32_t> reached(old_.size(), 0);
    for (std::size_t i = 0; i < segments; ++i) {
        expect(tree.first[i] >= 0 && tree.count[i] >= 1 &&
                   std::int64_t{tree.first[i]} + tree.count[i] <= rows,
               "a segment has rows that do not exist");
        expect(tree.begin[i] < tree.end[i], "a segment has no keys");
        for (std::int32_t row = tree.first[i]; row < tree.first[i] + tree.count[i]; ++row) {
            expect(tree.begin[i] == reached[row], "a segment does not begin where another ends");
            reached[row] = tree.end[i];
        }
    }
    for (std::size_t row = 0; row < tree.own.size(); ++row) {
        expect(reached[row] == tree.own[row], "segments do not end where a row's own keys begin");
        expect(reached[row] <= old_[row], "a row shares keys that it does not have yet");
    }
}

// The spans of all segments. Rows of many new tokens are taken out of segments.
void PassLayout::cut(const RowTree& tree, std::int64_t split_queries) {
    const auto shares = [&](std::int32_t row) {
        return starts_[row + 1] - starts_[row] <= split_queries;
    };
    for (std::size_t i = 0; i < tree.first.size(); ++i) {
        const std::int32_t last = tree.first[i] + tree.count[i];
        const std::int32_t begin = tree.begin[i], end = tree.end[i];
        const std::int64_t whole = (end - begin) / split_keys_;
        const auto rest = static_cast<std::int32_t>(begin + whole * split_keys_);
        const std::int64_t splits = whole + (rest < end);
        for (std::int32_t row = tree.first[i]; row < last; ++row) {
            if (!shares(row)) continue;
            const std::int32_t first = row;
            const std::int32_t before = parts_[first];
            while (row < last && shares(row)) own_[row++] = end;
            const std::int32_t first_token = starts_[first], tokens = starts_[row] - first_token;
            const auto part = static_cast<std::int32_t>(before + splits);
            spans_.push_back({first_token, tokens, begin, end, first, before});
            if (rest < end) rests_.push_back({first_token, tokens, rest, end, first, part - 1});
            shape_.splits += splits;
            max_tokens_ = std::max<std::int64_t>(max_tokens_, tokens);
            max_parts_ = std::max<std::int64_t>(max_parts_, part);
            std::fill(parts_.begin() + first, parts_.begin() + row, part);
        }
    }
    std::ranges::stable_sort(rests_, std::greater(), [](const Span& s) { return s.end - s.begin; });
}

// Longest first: those that are as long as can be, and then the rests.
std::int32_t* PassLayout::write_splits(std::int32_t* out) const {
    const auto put = [&](const Span& s, std::int32_t begin, std::int32_t end, std::int32_t part) {
        for (const std::int32_t value : {s.first_token, s.tokens, begin, end, s.table_row, part}) {
            *out++ = value;
        }
    };
    for (const Span& s : spans_) {
        std::int32_t part = s.first_part;
        for (std::int64_t begin = s.begin; begin + split_keys_ <= s.end; begin += split_keys_) {
            put(s, static_cast<std::int32_t>(begin),
                static_cast<std::int32_t>(begin + split_keys_), part++);
        }
    }
    for (const Span& s : rests_) put(s, s.begin, s.end, s.first_part);
    return out;
}

void PassLayout::take_tables(const PageManager& pages, Ints slots) {
    std::vector<std::int32_t> first_key = own_;
    for (const Span& s : spans_) {
        first_key[s.table_row] = std::min(first_key[s.table_row], s.begin);
    }
    table_start_.reserve(slots.size());
    std::vector<std::int64_t> begins;
    begins.reserve(slots.size());
    std::int64_t entries = 0;
    for (std::size_t row = 0; row < slots.size(); ++row) {
        const std::int64_t begin = first_key[row] / pages.page_size();
        begins.push_back(begin);
        table_start_.push_back(static_cast<std::int32_t>(entries - begin));
        entries += pages.held()[slots[row]] - begin;
    }
    shape_.pages = entries;
    table_.pages.reserve(4 * slots.size());
    pages.append_tables(slots, begins, table_start_, table_);
}

void PassLayout::write(std::span<std::byte> buffer, Offsets offsets, const PassShape& room,
                       bool back) const {
    if (offsets.size() != static_cast<std::size_t>(PassField::kCount)) {
        throw PageMisuse("a pass has " + std::to_string(static_cast<int>(PassField::kCount)) +
                         " fields, and not " + std::to_string(offsets.size()));
    }
    if (room.rows < shape_.rows || room.tokens < shape_.tokens || room.splits < shape_.splits ||
        room.pages < shape_.pages) {
        throw PageMisuse("a pass does not fit into its buffer");
    }
    const auto int32s = [&](PassField which, std::int64_t size) {
        return field<std::int32_t>(buffer, offsets, which, size);
    };
    const auto int64s = [&](PassField which, std::int64_t size) {
        return field<std::int64_t>(buffer, offsets, which, size);
    };
    // All of them are looked for before any is written.
    std::int64_t* const positions = int64s(PassField::kPositions, room.tokens);
    std::int64_t* const write = int64s(PassField::kWrite, room.tokens);
    std::int64_t* const stride = int64s(PassField::kStride, room.tokens);
    std::int32_t* const table = int32s(PassField::kPageTable, room.pages);
    std::int32_t* const table_start = int32s(PassField::kTableStart, room.rows);
    std::int32_t* const lengths = int32s(PassField::kLengths, room.rows);
    std::int32_t* const starts = int32s(PassField::kStarts, room.rows + 1);
    std::int32_t* const own = int32s(PassField::kOwn, room.rows);
    std::int32_t* const parts = int32s(PassField::kParts, room.rows);
    std::int32_t* const token_rows = int32s(PassField::kTokenRows, room.tokens);
    std::int32_t* const splits = int32s(PassField::kSplits, 6 * room.splits);

    fill(write, places_, room.tokens, std::int64_t{-1});
    if (table != nullptr) pages_->write_table(table_, table);
    fill(table_start, table_start_, room.rows, 0);
    fill(starts, starts_, room.rows + 1, starts_.back());
    fill(own, own_, room.rows, 0);
    fill(parts, parts_, room.rows, 0);
    if (stride != nullptr) {
        std::fill(std::fill_n(stride, shape_.tokens, 1), stride + room.tokens, 0);
    }
    const std::int32_t behind = back ? 1 : 0;
    for (std::int64_t row = 0; row < shape_.rows; ++row) {
        const std::int32_t begin = starts_[row];
        const std::int32_t end = starts_[row + 1];
        if (lengths != nullptr) lengths[row] = old_[row] + (end - begin) - behind;
        if (positions != nullptr) {
            for (std::int32_t i = begin; i < end; ++i) positions[i] = old_[row] + i - begin - behind;
        }
        if (token_rows != nullptr) {
            std::fill(token_rows + begin, token_rows + end, static_cast<std::int32_t>(row));
        }
    }
    if (lengths != nullptr) std::fill(lengths + shape_.rows, lengths + room.rows, 0);
    if (positions != nullptr) std::fill(positions + shape_.tokens, positions + room.tokens, 0);
    if (token_rows != nullptr) std::fill(token_rows + shape_.tokens, token_rows + room.tokens, 0);
    if (splits != nullptr) {
        std::fill(write_splits(splits), splits + 6 * room.splits, 0);
    }
}

}  // namespace w2s
