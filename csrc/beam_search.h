// Beam search of the base alone: which continuations of a request's beams are its next beams.
//
// As transformers' `generate(num_beams=...)` decides it. All of a request's beams that go on are
// continued by every token, and those ranked by log-prob. Of the first `width` in rank, those that end
// join the finished ones, by log-prob over length to the power of the penalty, of which the best
// `width` stay. The first `width` that do not end go on. It is over when none does, or when `width`
// have finished and, by early stopping, that is enough.
//
// Between two rounds the kept beams are those that go on, best first, and then the finished ones, best
// first. A round is one token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "beams.h"
#include "page_manager.h"
#include "rounds.h"

namespace w2s {

// A continuation of a request's beams with which a text ends; see Beams::end_text.
struct EndedText {
    std::int32_t request;
    std::int32_t rank;  // among all continuations of that request, best first
    std::int32_t length, ending;
};

// The likeliest continuations of each kept beam that goes on, [rows, k], best first, in the order of
// lay_out_sources: their tokens, and what the base gives these. For a width W, and E tokens that end a
// response, k = W + E or the whole vocabulary is enough.
struct Continuations {
    std::span<const std::int32_t> tokens;
    std::span<const float> logprobs;
};

// Requests for which a best continuation's log-prob is not finite, the first of each; and those of
// which every continuation would end a response too soon.
std::vector<BrokenNumber> broken_continuations(const Requests& requests,
                                               const Continuations& found);

// A continuation of a kept beam, and whether its token ends a response by itself.
struct RankedContinuation {
    std::int32_t parent, token;
    bool ends;
};
// All continuations of a request's beams, best first. None where they are broken.
std::vector<RankedContinuation> rank_continuations(const Requests& requests,
                                                   const Continuations& found, std::size_t request);

// Close the round under way of each request that is not broken, when the base has run its sources:
// the beams that go on get slots, and those of others are free again. Returns pages to be copied.
// Throws OutOfPages, in the middle of it.
std::vector<PageCopy> advance_beams(const Requests& requests, const Continuations& found,
                                    PageManager& base, std::span<const EndedText> ended = {});

}  // namespace w2s
