// The selection of many rounds at once: what the guides' models run, and what score_select
// (kernels/score_select.py) is given of all candidates.
//
// Some tokens may still be on the device, as they were drawn. So a token is named by its index among
// all that there are: first those drawn, [steps, rows], and behind them those that are known here.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "fields.h"
#include "pass_room.h"
#include "rounds.h"

namespace w2s {

struct Scoring {
    std::int64_t steps = 0, rows = 0;  // of those drawn
    Int64s tokens;                     // those known
    std::vector<float> logprobs;       // theirs; 0 for tokens that are not new
    Int32s counts;   // new tokens of each candidate whose parent went on
    Int64s targets;  // those tokens, one candidate's after the other
    // Of each model but the base: what it runs, for each chunk the token before it and its own but
    // the last; where; and what rows share.
    std::vector<Int64s> inputs;
    std::vector<Int32s> slots;
    std::vector<RowLevels> levels;
    std::vector<double> weights;  // of the guides
    // Of each candidate, each request, or each id that ends a response.
    Int64s cu_tokens;
    std::vector<double> previous;
    Int64s lengths;  // before the chunk
    Int32s parents;
    Int64s siblings, cu_candidates, stops, cu_stops, width;
    std::vector<std::uint8_t> mean, dedup;
    std::int64_t max_candidates = 0, max_width = 0;

    // Calls take(name, values, spare, names_tokens) for all that travels to the device, in an order
    // that stays the same. `names_tokens`: whether values are indices of tokens.
    template <typename Take>
    void columns(Take take) const {
        take("tokens", tokens, std::int64_t{0}, false);
        take("logprobs", logprobs, 0.0F, false);
        take("targets", targets, std::int64_t{0}, true);
        for (std::size_t m = 0; m < inputs.size(); ++m) {
            take("inputs" + std::to_string(m), inputs[m], std::int64_t{0}, true);
        }
        take("weights", weights, 0.0, false);
        take("cu_tokens", cu_tokens, cu_tokens.back(), false);
        take("previous", previous, 0.0, false);
        take("lengths", lengths, std::int64_t{0}, false);
        take("parents", parents, std::int32_t{-1}, false);
        take("siblings", siblings, std::int64_t{0}, false);
        take("cu_candidates", cu_candidates, cu_candidates.back(), false);
        take("stops", stops, std::int64_t{0}, false);
        take("cu_stops", cu_stops, cu_stops.back(), false);
        take("width", width, std::int64_t{0}, false);
        take("mean", mean, std::uint8_t{0}, false);
        take("dedup", dedup, std::uint8_t{0}, false);
    }
};

// The rounds of `requests`, which are complete when the growing rows of `drawing`, as lay_out_rows
// has them, have got `steps` more tokens. Those of other requests have all of theirs.
Scoring lay_out_scoring(const Requests& requests, const Requests& drawing, std::int64_t steps,
                        std::vector<double> weights);

// The guides' passes of a selection, moved on in their pages, as a recording runs them.
class ScoringPasses {
public:
    // Makes room for the new tokens in the guides' slots, lays the passes out, and counts the tokens.
    // `managers`: of the guides' models. Throws OutOfPages.
    ScoringPasses(const Scoring& scoring, const Beams::Managers& managers, std::int64_t split_keys,
                  std::int64_t split_queries);

    const std::vector<PassLayout>& passes() const { return passes_; }
    // Of each model: shared pages that are written at, which are to be copied first.
    const std::vector<std::vector<PageCopy>>& copies() const { return copies_; }

private:
    std::vector<PassLayout> passes_;
    std::vector<std::vector<PageCopy>> copies_;
};

// Fills the columns of a buffer with room for `items` of each, in their order, at these offsets in
// bytes. `room`: rows that the buffer of drawn tokens has.
void write_columns(const Scoring& scoring, std::span<std::byte> buffer,
                   std::span<const std::int64_t> offsets, std::span<const std::int64_t> items,
                   std::int64_t room);

}  // namespace w2s
