// What callers have to see to.
#pragma once

#include <stdexcept>

namespace w2s {

inline void expect(bool right, const char* what) {
    if (!right) throw std::invalid_argument(what);
}

}  // namespace w2s
