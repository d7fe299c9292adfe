// What the rows of a pass of a search share: rows of a request its first tokens, siblings their
// parent's history.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "beams.h"
#include "plan.h"
#include "row_tree.h"

namespace w2s {

// Levels of a tree: rows of a request share the first `together` tokens, siblings what they
// `inherited`; prompts are counted.
struct RowLevels {
    std::vector<std::int32_t> requests, together, families, inherited;

    void reserve(std::size_t rows) {
        for (auto* column : {&requests, &together, &families, &inherited}) column->reserve(rows);
    }

    TreeSegments tree() const {
        const TreeLevel levels[] = {{requests, together}, {families, inherited}};
        return cut_levels(levels, requests.size());
    }
};

inline RowTree view(const TreeSegments& tree) {
    return {tree.first, tree.count, tree.begin, tree.end, tree.own};
}

// Adds the rows of one request after the other.
class Leveller {
public:
    explicit Leveller(RowLevels& levels) : levels_(levels) {}

    // `prompt`: tokens of it that stand in the KV.
    void add(const Beams& request, const Beam& beam, std::int32_t prompt) {
        const bool other = &request != request_;
        if (other) ++requests_;
        if (other || beam.parent != parent_) ++families_;
        request_ = &request;
        parent_ = beam.parent;
        levels_.requests.push_back(requests_);
        levels_.families.push_back(families_);
        levels_.together.push_back(prompt + std::min(request.shared(), beam.inherited));
        levels_.inherited.push_back(prompt + beam.inherited);
    }

private:
    RowLevels& levels_;
    const Beams* request_ = nullptr;
    std::int32_t parent_ = Beam::kNone;
    std::int32_t requests_ = -1;
    std::int32_t families_ = -1;
};

}  // namespace w2s
