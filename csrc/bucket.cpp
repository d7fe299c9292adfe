#include "bucket.h"

#include <algorithm>
#include <bit>

namespace w2s {
namespace {

// Entries of page tables that most buckets have room for: with pages of 16, 2,048 tokens that 16
// rows share, all or some of them, and 128 of each row's own.
constexpr std::int64_t kSharedPages = 128, kOwnPages = 8;

std::int64_t power_of_two(std::int64_t count) {
    return static_cast<std::int64_t>(
        std::bit_ceil(static_cast<std::uint64_t>(std::max<std::int64_t>(count, 1))));
}

// The first of `first`, `factor` * `first`, ... that is at least `value`.
std::int64_t rung(std::int64_t value, std::int64_t first, std::int64_t factor) {
    while (first < value) first *= factor;
    return first;
}

}  // namespace

Bucket smallest_bucket(const SplitRule& rule, std::int64_t rows, std::int64_t tokens,
                       std::int64_t max_q, std::int64_t most_pages) {
    const std::int64_t sharing = 16 * std::min(max_q, rule.split_queries);
    const std::int64_t pages =
        std::min((rows + 15) / 16 * kSharedPages + rows * kOwnPages, rows * most_pages);
    return {rows, tokens, max_q, std::max<std::int64_t>(7 * rows / 16, 8), sharing, 4,
            rule.few_keys, pages};
}

Bucket bucket_of(const SplitRule& rule, const PassBounds& pass, std::int64_t rows,
                 std::int64_t tokens, std::int64_t most_pages) {
    Bucket found = smallest_bucket(rule, rows, tokens, power_of_two(pass.max_q), most_pages);
    const bool shares = found.max_q <= rule.split_queries || pass.splits > 0;
    found.pages = std::min(rung(pass.pages, found.pages, 2), rows * most_pages);
    if (!shares || pass.max_own > found.max_own) {
        found.max_own = rung(pass.max_own, rule.split_keys, 4);
    }
    if (shares) {
        found.splits = rung(pass.splits, found.splits, 2);
        found.max_tokens = rung(pass.max_tokens, found.max_tokens, 4);
        found.max_parts = rung(pass.max_parts, found.max_parts, 4);
    } else {
        // Room for partial results of rows that have none would be most of a pass's memory.
        found.splits = found.max_tokens = found.max_parts = 0;
        if (pass.max_own == 0) found.max_own = 0;
    }
    return found;
}

std::int64_t round_up_tokens(std::int64_t count) {
    const int bits = std::bit_width(static_cast<std::uint64_t>(count));
    const std::int64_t step = std::int64_t{1} << std::max(0, bits - 3);
    return (count + step - 1) / step * step;
}

}  // namespace w2s
