// All kernels for one instruction set: this file is compiled once for each, with other flags (see setup.py).
//
// The interface is C and knows pointers and sizes alone, so that it depends on no version of Python or PyTorch. Whoever
// calls answers for shapes and for buffers that are large enough (src/bestiary/ops/native).
#include "linear_attention.h"
#include "selective_scan.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT i64 bestiary_version() { return 1; }
EXPORT i64 bestiary_lanes() { return W; }
EXPORT i64 bestiary_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

EXPORT i64 bestiary_scan_starts(i64 batch, i64 time, i64 channels, i64 states) {
  return batch * scan::chunks(time) * scan::blocks(channels) * states * W;
}
EXPORT i64 bestiary_scan_groups(i64 channels) {
  const i64 nb = scan::blocks(channels);
  return nb < scan::GROUPS ? nb : scan::GROUPS;
}
EXPORT void bestiary_scan_forward(const Scan* s) { scan::forward(*s); }
EXPORT void bestiary_scan_backward(const Scan* s, const ScanBack* r) { scan::backward(*s, *r); }

// For tests: the functions of vec.h on n numbers, n a multiple of the lanes.
EXPORT void bestiary_elementwise(i64 n, i64 which, const float* x, float* y) {
  for (i64 i = 0; i < n; i += W) {
    vf v = load(x + i);
    store(y + i, which == 0 ? exp(v) : which == 1 ? sigmoid(v) : which == 2 ? softplus(v) : silu(v));
  }
}

EXPORT i64 bestiary_linear_attention_starts(i64 batch, i64 time, i64 heads, i64 keys, i64 columns) {
  return batch * heads * linear::chunks(time) * linear::padded(keys, linear::ROWS) * linear::padded(columns, W);
}
EXPORT i64 bestiary_linear_attention_parts(i64 heads, i64 groups) { return linear::parts(heads, groups); }
EXPORT void bestiary_linear_attention_forward(const LinearAttention* s) { linear::forward(*s); }
EXPORT void bestiary_linear_attention_backward(const LinearAttention* s, const LinearAttentionBack* r) {
  linear::backward(*s, *r);
}
