// Buckets: bounds of the passes that one recording serves; Bucket in
// w2s_fast/attention/static_plan.py says what each is for.
//
// They choose how many programs are launched and never what is computed for a row: its attention
// is the same in every bucket.
#pragma once

#include <cstdint>

#include "plan.h"

namespace w2s {

// How attention cuts keys: the constants of kernels/paged_attention_triton.py.
struct SplitRule {
    std::int64_t split_keys, split_queries, few_keys;
};

struct Bucket {
    std::int64_t rows, tokens, max_q, splits, max_tokens, max_parts, max_own, pages;
};

// The first bucket of so many rows and tokens, of rows of `most_pages` at most.
//
// It is enough for 4 x 4 candidates with a prompt of 512 tokens. Such a request has a split for each
// 256 tokens of the prompt, one for what its hypotheses have in common, and one for each of their 4
// histories, 7 in all; a row has up to 4 of them. There is no room for more: programs of splits that
// a pass does not have are launched, and return. Nor is there for own keys that take programs of
// their own: a chunk has fewer.
Bucket smallest_bucket(const SplitRule& rule, std::int64_t rows, std::int64_t tokens,
                       std::int64_t max_q, std::int64_t most_pages);

// The first bucket of so many rows and tokens that is large enough for a pass.
Bucket bucket_of(const SplitRule& rule, const PassBounds& pass, std::int64_t rows,
                 std::int64_t tokens, std::int64_t most_pages);

// At most a quarter more: the work of a pass grows with its tokens.
std::int64_t round_up_tokens(std::int64_t count);

}  // namespace w2s
