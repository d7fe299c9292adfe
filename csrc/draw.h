// One draw of many requests, as recordings run it: what models run before the first tokens of their
// candidates, and the rows that grow from there. One model draws, or several that draw together.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "bucket.h"
#include "fields.h"
#include "pass_room.h"
#include "rounds.h"

namespace w2s {

// What travels with the rows beside the first model's pass: in this order.
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
    // Where logits are fused:
    kBeta,          // float32 [rows, guides]
    kPlausibility,  // float32 [rows]
    kDynamic,       // bool [rows]
    kCount
};

// And with the sources of each model; kSource only with those of the first.
enum class SourceColumn {
    kTokens,  // int64 [tokens], what is run
    kLast,    // int64 [rows of the sources], which of them is each source's last
    kSource,  // int64 [rows], the source of each row
    kCount
};

// Of each model: buckets of the sources' pass, and of the rows' ones.
struct DrawBuckets {
    std::vector<Bucket> sources, rows;
};

class DrawLayout {
public:
    using Columns = std::span<const std::int64_t>;

    // `managers`: of the models that draw, the base first. Changes nothing. They must live as long.
    DrawLayout(Requests requests, Beams::Managers managers);

    std::size_t models() const { return managers_.size(); }
    std::size_t num_sources() const { return of_models_.front().sources.slots.size(); }
    // Candidates that will grow; the most tokens that sources of a model run, and of one of them.
    std::int64_t rows() const { return rows_; }
    std::int64_t tokens() const { return tokens_; }
    std::int64_t max_new() const { return max_new_; }

    // Moves on in the models' pages: the sources' tokens, slots for all candidates, and all of their
    // tokens but the last, of `steps` >= 2. Throws OutOfPages, in the middle of it.
    void begin(std::int64_t steps, std::int64_t split_keys, std::int64_t split_queries);

    // What follows is there once it has begun, of each model.
    const PassLayout& source_pass(std::size_t model) const { return at(model).source_pass.value(); }
    const PassLayout& row_pass(std::size_t model) const { return at(model).row_pass.value(); }
    // Pages to be copied before the sources run, and before the second tokens are appended.
    const std::vector<PageCopy>& before(std::size_t model) const { return at(model).before; }
    const std::vector<PageCopy>& copies(std::size_t model) const { return at(model).copies; }
    // `rows`, `sources`: what both are rounded up to. `most`: rows that are recorded, and so the most
    // tokens of sources. `most_pages`: of a row, in each model.
    DrawBuckets buckets(const SplitRule& rule, std::int64_t rows, std::int64_t sources,
                        std::int64_t most, std::span<const std::int64_t> most_pages) const;
    // Whether a row needs a share of the likeliest token's probability, or chooses its factors.
    bool some_plausible() const;
    bool some_dynamic() const;

    // Into one buffer, with a room and columns for each model: of the first RowColumn or SourceColumn,
    // of others only copies, or tokens and last. Rows stand one token behind; see PassLayout::write.
    void write_rows(std::span<std::byte> buffer, const std::vector<const PassRoom*>& rooms,
                    const std::vector<Columns>& columns) const;
    // `rows`: those that there is room for.
    void write_sources(std::span<std::byte> buffer, const std::vector<const PassRoom*>& rooms,
                       const std::vector<Columns>& columns, std::int64_t rows) const;

private:
    struct OfModel {
        Sources sources;
        std::optional<PassLayout> source_pass, row_pass;
        std::vector<PageCopy> before, copies;
    };

    const OfModel& at(std::size_t model) const { return of_models_.at(model); }
    void write_settings(std::span<std::byte> buffer, Columns columns, std::int64_t rows) const;

    Requests requests_;
    Beams::Managers managers_;
    std::vector<OfModel> of_models_;
    std::int64_t rows_ = 0;
    std::int64_t tokens_ = 0;
    std::int64_t max_new_ = 0;
    GrowingRows growing_;  // of the first model, with the settings of all
};

}  // namespace w2s
