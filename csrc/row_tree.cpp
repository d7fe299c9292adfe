#include "row_tree.h"

#include <algorithm>
#include <stdexcept>

namespace w2s {

TreeSegments cut_levels(std::span<const TreeLevel> levels, std::size_t rows) {
    TreeSegments found;
    found.own.assign(rows, 0);
    for (const TreeLevel& level : levels) {
        if (level.groups.size() != rows || level.ends.size() != rows) {
            throw std::invalid_argument("a level has a group and an end for each row");
        }
        for (std::size_t first = 0, last = 0; first < rows; first = last) {
            while (last < rows && level.groups[last] == level.groups[first]) ++last;
            const std::int32_t begin = found.own[first], end = level.ends[first];
            if (level.groups[first] < 0 || end - begin < kShortestSegment) continue;
            found.first.push_back(static_cast<std::int32_t>(first));
            found.count.push_back(static_cast<std::int32_t>(last - first));
            found.begin.push_back(begin);
            found.end.push_back(end);
            std::fill(found.own.begin() + first, found.own.begin() + last, end);
        }
    }
    return found;
}

}  // namespace w2s
