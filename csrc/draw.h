// One draw of many requests, as recordings run it: what the base runs before the first tokens of their
// candidates, and the rows that grow from there.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "fields.h"
#include "pass_room.h"
#include "rounds.h"

namespace w2s {

// What travels with the rows beside their pass: in this order.
enum class RowColumn {
    kTemperature,  // float32; these seven are [rows], as in SamplingBatch
    kTopK,         // int64
    kTopP,         // float64
    kMinP,         // float64
    kSeed,         // int64
    kCandidate,    // int64
    kPosition,     // int64, of the next token to be drawn
    kTaken,        // int64 [1], steps taken: none
    kCopies,       // int32 [2 rows], pairs of pages; -1 behind those that there are
    kCount
};

// And with the sources.
enum class SourceColumn {
    kTokens,  // int64 [tokens], what is run
    kLast,    // int64 [rows of the sources], which of them is each source's last
    kSource,  // int64 [rows], the source of each row
    kCount
};

class DrawLayout {
public:
    // Changes nothing. The manager must live as long.
    DrawLayout(Requests requests, PageManager& base);

    const Sources& sources() const { return sources_; }
    // Candidates that will grow, tokens that the sources run, and the most of one of them.
    std::int64_t rows() const { return rows_; }
    std::int64_t tokens() const { return std::ssize(sources_.tokens); }
    std::int64_t max_new() const { return max_new_; }

    // Moves on in the base's pages: the sources' tokens, slots for all candidates, and all of their
    // tokens but the last, of `steps` >= 2. Throws OutOfPages, in the middle of it.
    void begin(std::int64_t steps, std::int64_t split_keys, std::int64_t split_queries);

    // What follows is there once it has begun.
    const PassLayout& source_pass() const { return source_pass_.value(); }
    const PassLayout& row_pass() const { return row_pass_.value(); }
    // Pages to be copied before the sources run, and before the second tokens are appended.
    const std::vector<PageCopy>& before() const { return before_; }
    const std::vector<PageCopy>& copies() const { return copies_; }

    // `columns`: offsets, of RowColumn or SourceColumn. Rows stand one token behind; see
    // PassLayout::write.
    void write_rows(std::span<std::byte> buffer, const PassRoom& room,
                    std::span<const std::int64_t> columns) const;
    // `rows`: those that there is room for.
    void write_sources(std::span<std::byte> buffer, const PassRoom& room,
                       std::span<const std::int64_t> columns, std::int64_t rows) const;

private:
    Requests requests_;
    PageManager& base_;
    Sources sources_;
    std::int64_t rows_ = 0;
    std::int64_t max_new_ = 0;
    GrowingRows growing_;
    std::optional<PassLayout> source_pass_, row_pass_;
    std::vector<PageCopy> before_, copies_;
};

}  // namespace w2s
