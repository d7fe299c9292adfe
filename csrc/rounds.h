// A step of many requests at once: what their passes are given, and what becomes of what they find.
//
// Rows and candidates stand request by request, and within a request in the order of their
// candidates. Nothing here waits, and each call happens as a whole: an exception of Python's comes
// before or after it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "beams.h"
#include "page_manager.h"
#include "row_levels.h"

namespace w2s {

using Requests = std::vector<Beams*>;
using Int32s = std::vector<std::int32_t>;
using Int64s = std::vector<std::int64_t>;

// Beams whose KV stands, the tokens to append to it, and how many candidates go on from each.
struct Sources {
    Int32s slots, counts, children;
    Int64s tokens;  // one source's after the other
    RowLevels levels;
};

// The growing candidates, with their sampling settings; see SamplingBatch.
struct GrowingRows {
    Int32s slots;
    std::vector<float> temperature;
    Int64s top_k;
    std::vector<double> top_p, min_p;
    Int64s seed, candidate, position;
    RowLevels levels;
    // Of those that fuse: the factors of the guides, row after row; and the others of SearchSettings.
    std::vector<float> betas, plausibility;
    std::vector<std::uint8_t> dynamic;
};

// Where a model gave a number that is not finite.
struct BrokenNumber {
    std::int32_t request;
    std::int64_t token;     // as cu_tokens counts them; of take_tokens: -1; of take_fused: the model
    std::int32_t position;  // in its response
};

// Open a round where none is under way; nobody is aside any more.
void begin_rounds(const Requests& requests);

// Tokens sampled and scored so far, of all of them.
struct Progress {
    std::int64_t sampled = 0, scored = 0;
};
Progress progress(const Requests& requests);

Int32s tokens_left(const Requests& requests);

// Whether a request has to wait: it goes on from texts that do not all stand. In its first round it
// can draw before the guides have its prompt.
std::vector<std::uint8_t> entering(const Requests& requests, const Beams::Managers& managers);

// Whether, before it forks, texts of a request do not stand in one model: in round 1 the prompt, else
// its beams that are not finished; all but the last token of each.
std::vector<std::uint8_t> lacking(const Requests& requests, const PageManager& manager, int model);

// What a model runs before the first tokens of these requests are drawn from it.
Sources lay_out_sources(const Requests& requests, const PageManager& manager, int model);

// Slots for all children of parents that go on, in one model; the first one takes its parent's.
// Throws OutOfPages, and then nothing has changed. Candidates that have slots of their own stay as
// they are.
std::vector<PageCopy> fork_beams(const Requests& requests, PageManager& manager, int model);

GrowingRows lay_out_rows(const Requests& requests, int model);

// Append `steps` drawn tokens to each growing candidate, [rows, steps], up to where it ends. The
// first broken log-prob of a request is reported.
std::vector<BrokenNumber> take_tokens(const Requests& requests,
                                      std::span<const std::int64_t> tokens,
                                      std::span<const float> logprobs, std::int64_t steps);

// A guide: its weight, and the places of its models, 0 for the base; the untuned one -1: it has none.
struct GuideTerm {
    double weight;
    int tuned, untuned;
};

// What was drawn from several models at once, in the steps of a draw.
struct FusedDraws {
    std::int64_t steps, rows;
    std::span<const std::int64_t> tokens;  // [rows, steps]
    // The base's, +inf where only the fused logits are broken.
    std::span<const float> logprobs;       // [rows, steps]
    std::span<const float> others;         // [rows, steps, models - 1], of the other models
};
// No model: the fused logits are broken, and those of each are sound.
inline constexpr std::int64_t kFused = -1;

// As take_tokens, with scores: of each token the sum of weight (log p_tuned - log p_untuned). Two that
// are -inf cancel out, as they did in the fused logits.
std::vector<BrokenNumber> take_fused(const Requests& requests, const FusedDraws& drawn,
                                     const std::vector<GuideTerm>& guides);

// The same for those who are `drawing`, from a selection among these requests: candidate c's chunk is
// cu_tokens[c] : cu_tokens[c + 1], and ends with the `steps` tokens that were drawn for it, if it
// grows. What is reported is counted among those who are drawing.
std::vector<BrokenNumber> take_selected(const Requests& requests, const Requests& drawing,
                                        std::span<const std::int64_t> cu_tokens,
                                        std::span<const std::int64_t> tokens,
                                        std::span<const double> logprobs, std::int64_t steps);

// Give back what finished candidates hold in one model, and of paused ones what stands behind their
// texts, which then stands one token behind as ever.
void release_finished(const Requests& requests, PageManager& manager, int model);

// Take over what the selection computed: scores of the new tokens, which begin for each candidate
// where lay_out_scoring said; of all candidates [C]; and the first broken token of each [C], -1
// where there is none. The first of a request is reported.
std::vector<BrokenNumber> take_scores(const Requests& requests,
                                      std::span<const std::int64_t> cu_tokens,
                                      std::span<const double> token_scores,
                                      std::span<const double> scores,
                                      std::span<const std::int64_t> broken);

// Keep the candidates [R, width] of each request, best first, up to the first -1, and give back
// what only others hold. Returns, of each manager, pages to be copied for those kept more than once.
std::vector<std::vector<PageCopy>> end_rounds(const Requests& requests,
                                              std::span<const std::int64_t> kept,
                                              const Beams::Managers& managers);

// End rounds without a selection: all candidates are kept.
void keep_all(const Requests& requests, const Beams::Managers& managers);

// Candidates of each request that grow.
Int64s growing(const Requests& requests);

// Candidates of each request that grow in the round under way, or else in the next one.
Int64s round_rows(const Requests& requests);

// Pages that a request can hold at most in its next round: of each model, 0 where it runs not.
Int64s round_pages(const Beams& request, std::span<const std::int64_t> page_sizes);

// All slots that these requests hold in one model.
Int32s held_slots(const Requests& requests, int model);

}  // namespace w2s
