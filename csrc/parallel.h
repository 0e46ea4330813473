// Work split over threads. What is computed never depends on how many there are: every item is done by one thread, in the
// same way, into memory of its own; sums over items are taken afterwards, in order.
#pragma once

#include <cstdlib>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vec.h"

namespace {

// A buffer of floats for one thread, aligned to a cache line; empty, not initialised.
class Buffer {
 public:
  explicit Buffer(i64 count) : data_(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64 + 64))) {
    if (!data_) std::abort();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() { return data_; }

 private:
  float* data_;
};

// body(buffer, i) for every i below count; each thread gets a buffer of that many floats. `work`: of all, in operations.
template <class Body>
void parallel(i64 count, i64 work, i64 floats, Body body) {
  int threads = 1;
#ifdef _OPENMP
  if (work > 1 << 16) threads = omp_get_max_threads();
  if (threads > count) threads = count < 1 ? 1 : static_cast<int>(count);
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    Buffer buffer(floats);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (i64 i = 0; i < count; i++) body(static_cast<float*>(buffer), i);
  }
}

}  // namespace
