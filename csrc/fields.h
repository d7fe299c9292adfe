// Fields of a buffer: one column each, laid out by those who own the buffer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "page_manager.h"

namespace w2s {

// Where a field begins; nullptr if it is left out, which a negative offset says.
template <typename T>
T* field_of(std::span<std::byte> buffer, std::int64_t offset, std::int64_t items) {
    if (offset < 0) return nullptr;
    const std::int64_t bytes = items * static_cast<std::int64_t>(sizeof(T));
    if (offset > static_cast<std::int64_t>(buffer.size()) - bytes) {
        throw PageMisuse("a field ends behind its buffer");
    }
    std::byte* const begin = buffer.data() + offset;
    if (reinterpret_cast<std::uintptr_t>(begin) % alignof(T) != 0) {
        throw PageMisuse("a field lies at an odd address");
    }
    return reinterpret_cast<T*>(begin);
}

// `values`, and `spare` for the rest of so many items.
template <typename T, typename Values>
void fill(T* target, const Values& values, std::int64_t items, T spare) {
    if (target == nullptr) return;
    std::fill(std::copy(values.begin(), values.end(), target), target + items, spare);
}

// Pairs of pages to be copied, one a row at most; -1 behind those that there are.
inline void write_copies(std::span<std::byte> buffer, std::int64_t offset,
                         std::span<const PageCopy> copies, std::int64_t rows) {
    if (std::ssize(copies) > rows) throw PageMisuse("a row copies one page at most");
    std::int32_t* copy = field_of<std::int32_t>(buffer, offset, 2 * rows);
    std::int32_t* const end = copy + 2 * rows;
    for (const auto [source, destination] : copies) {
        *copy++ = source;
        *copy++ = destination;
    }
    std::fill(copy, end, -1);
}

}  // namespace w2s
