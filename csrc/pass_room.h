// Where the fields of a pass lie in a buffer, and what they have room for.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace w2s {

struct PassRoom {
    std::vector<std::int64_t> offsets;  // in bytes, in the order of PassField
    PassShape shape;
};

}  // namespace w2s
