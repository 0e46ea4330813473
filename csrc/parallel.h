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

// Whether memory ran out in what this thread called: what it computed is then worthless.
thread_local bool exhausted = false;

// A buffer of floats for one thread, aligned to a cache line; not initialised. Where there is no memory, `missing` says so,
// and `exhausted` in the thread that asked for it.
class Buffer {
 public:
  explicit Buffer(i64 count) : data_(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64 + 64))) {
    if (!data_) exhausted = true;
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() { return data_; }
  bool missing() const { return !data_; }

 private:
  float* data_;
};

// body(buffer, i) for every i below count; each thread gets a buffer of that many floats. `work`: of all, in operations.
template <class Body>
void parallel(i64 count, i64 work, i64 floats, Body body) {
  int threads = 1;
  bool short_of = false;
#ifdef _OPENMP
  if (work > 1 << 16) threads = omp_get_max_threads();
  if (threads > count) threads = count < 1 ? 1 : static_cast<int>(count);
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    Buffer buffer(floats);
    if (buffer.missing()) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
      short_of = true;
    }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (i64 i = 0; i < count; i++)
      if (!buffer.missing()) body(static_cast<float*>(buffer), i);
  }
  if (short_of) exhausted = true;
}

// What a kernel returns: 0, or 1 where memory ran out.
template <class Body>
int status(Body body) {
  exhausted = false;
  body();
  return exhausted;
}

}  // namespace
