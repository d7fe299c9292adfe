// Which rows of a pass share which of their first tokens, cut into segments. What they are is said
// in w2s_fast/attention/row_tree.py.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace w2s {

// Keys that must be shared for a segment of their own. A segment of n keys that r rows share saves
// (r - 1) * n * 2 * D * itemsize bytes of reading a key head, and costs r * G * (D + 2) * 4 bytes,
// written and read again, for one more partial result of each of the G query heads. In 16 bits, with
// 4 siblings, both are equal at 3 keys for G = 1 and at 11 for G = 4. The rule knows neither r nor
// G, so that where a row's sums are cut never depends on which other rows run.
constexpr std::int32_t kShortestSegment = 8;

// Rows of the same group, which are neighbours, hold the same tokens up to `ends`; negative: the row
// shares nothing.
struct TreeLevel {
    std::span<const std::int32_t> groups, ends;
};

// Of each segment its rows first : first + count and its positions begin : end; and where each
// row's own keys begin.
struct TreeSegments {
    std::vector<std::int32_t> first, count, begin, end;
    std::vector<std::int32_t> own;
};

// The segments of levels from the root on, each of `rows` rows.
TreeSegments cut_levels(std::span<const TreeLevel> levels, std::size_t rows);

}  // namespace w2s
