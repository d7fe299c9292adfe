// Copies pages of one KV tensor in one launch: all layers, keys and values, all pairs.
//
// The tensor is [layers, 2, num_pages, page_bytes], contiguous. `planes` is layers * 2. A pair is
// two int32: source page, destination page; a pair with a negative destination is skipped, so
// that a list of fixed length can be padded. No destination may occur twice or be a source.
//
// Built as a plain shared library (see setup.py), to be loaded with ctypes: no torch, no Python.
#include <cstdint>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;
// Loads that a thread has in flight.
constexpr int kVectorsPerThread = 4;

__global__ void __launch_bounds__(kThreads)
copy_pages(int4* kv, const int2* __restrict__ pairs, std::int64_t num_pages,
           std::int64_t vectors_per_page) {
    const int2 pair = pairs[blockIdx.x];
    if (pair.y < 0) return;
    const std::int64_t first =
        static_cast<std::int64_t>(blockIdx.z) * kThreads * kVectorsPerThread + threadIdx.x;
    int4* const plane = kv + static_cast<std::int64_t>(blockIdx.y) * num_pages * vectors_per_page;
    const int4* const source = plane + pair.x * vectors_per_page;
    int4* const destination = plane + pair.y * vectors_per_page;
    // All loads before the first store: the compiler cannot know that the two pages differ.
    int4 moved[kVectorsPerThread];
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
        const std::int64_t vector = first + i * kThreads;
        if (vector < vectors_per_page) moved[i] = source[vector];
    }
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
        const std::int64_t vector = first + i * kThreads;
        if (vector < vectors_per_page) destination[vector] = moved[i];
    }
}

}  // namespace

// Returns a cudaError_t: 0 if the copy was launched. page_bytes must be a multiple of 16 and `kv`
// 16-byte aligned, which torch's allocator gives; otherwise cudaErrorInvalidValue.
extern "C" __attribute__((visibility("default"))) int w2s_copy_pages(
    void* kv, const std::int32_t* pairs, std::int64_t num_pairs, std::int64_t planes,
    std::int64_t num_pages, std::int64_t page_bytes, cudaStream_t stream) {
    if (num_pairs == 0) return cudaSuccess;
    const std::int64_t vectors = page_bytes / static_cast<std::int64_t>(sizeof(int4));
    const std::int64_t blocks =
        (vectors + kThreads * kVectorsPerThread - 1) / (kThreads * kVectorsPerThread);
    const bool aligned = page_bytes % sizeof(int4) == 0 &&
                         reinterpret_cast<std::uintptr_t>(kv) % sizeof(int4) == 0 &&
                         reinterpret_cast<std::uintptr_t>(pairs) % sizeof(int2) == 0;
    // The grid's limits: 2^31 - 1 pairs, 65,535 planes and 65,535 blocks a page.
    if (!aligned || num_pairs < 0 || num_pairs > INT32_MAX || planes < 1 || planes > 65535 ||
        blocks < 1 || blocks > 65535) {
        return cudaErrorInvalidValue;
    }
    const dim3 grid(static_cast<unsigned>(num_pairs), static_cast<unsigned>(planes),
                    static_cast<unsigned>(blocks));
    copy_pages<<<grid, kThreads, 0, stream>>>(static_cast<int4*>(kv),
                                             reinterpret_cast<const int2*>(pairs), num_pages,
                                             vectors);
    return cudaGetLastError();
}
