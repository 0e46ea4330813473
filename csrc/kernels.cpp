// All kernels for one instruction set: this file is compiled once for each, with other flags (see setup.py).
//
// The interface is C and knows pointers and sizes alone, so that it depends on no version of Python or PyTorch. Whoever
// calls answers for shapes and for buffers that are large enough (src/bestiary/ops/native). A change of a name, an argument
// or a struct raises the version, here and there. What computes returns 0, or 1 where memory ran out.
#include "cross_entropy.h"
#include "delta_rule.h"
#include "linear_attention.h"
#include "linear_recurrence.h"
#include "matvec.h"
#include "norm.h"
#include "program.h"
#include "selective_scan.h"
#include "short_convolution.h"
#include "wkv.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT i64 bestiary_version() { return 6; }
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
EXPORT int bestiary_scan_forward(const Scan* s) { return status([&] { scan::forward(*s); }); }
EXPORT int bestiary_scan_backward(const Scan* s, const ScanBack* r) { return status([&] { scan::backward(*s, *r); }); }

EXPORT int bestiary_convolution_forward(const Convolution* c) {
  return status([&] { short_convolution::forward(*c); });
}
EXPORT int bestiary_convolution_backward(const Convolution* c, const ConvolutionBack* g) {
  return status([&] { short_convolution::backward(*c, *g); });
}

EXPORT int bestiary_recurrence_forward(const Recurrence* r) { return status([&] { linear_recurrence::forward(*r); }); }
EXPORT int bestiary_recurrence_backward(const Recurrence* r, const RecurrenceBack* g) {
  return status([&] { linear_recurrence::backward(*r, *g); });
}

EXPORT i64 bestiary_wkv_chunk() { return wkv::T; }
EXPORT int bestiary_wkv_forward(const Wkv* s) { return status([&] { wkv::forward(*s); }); }
EXPORT int bestiary_wkv_backward(const Wkv* s, const WkvBack* g) { return status([&] { wkv::backward(*s, *g); }); }

EXPORT i64 bestiary_pack_bytes(i64 format, i64 outputs, i64 inputs) {
  return matvec::panels(outputs) * matvec::panel_bytes(format, inputs);
}
EXPORT int bestiary_pack(const Matrix* m, const float* w, char* to, float* scales) {
  return status([&] { matvec::pack(*m, w, to, scales); });
}
EXPORT int bestiary_unpack(const Matrix* m, i64 first, i64 count, float* w) {
  return status([&] { matvec::unpack(*m, first, count, w); });
}
EXPORT int bestiary_gather(const Matrix* m, i64 count, const i64* which, float* w) {
  return status([&] { matvec::gather(*m, count, which, w); });
}
EXPORT i64 bestiary_rounds_inputs() { return matvec::pairs_at_once(); }
EXPORT int bestiary_multiply(const Matrix* m, i64 rows, const float* x, i64 x_row, float* y, i64 y_row) {
  return status([&] { matvec::multiply(*m, rows, x, x_row, y, y_row); });
}

EXPORT int bestiary_program(const Program* p, void* const* regions) {
  return status([&] { program::run(*p, regions); });
}
EXPORT i64 bestiary_delta_steps(i64 keys, i64 values) { return delta::steps(keys, values); }
EXPORT i64 bestiary_delta_panels(i64 values) { return delta::panels(values); }
EXPORT int bestiary_delta_forward(const Delta* d) { return status([&] { delta::forward(*d); }); }
EXPORT int bestiary_delta_backward(const Delta* d, const DeltaBack* r) {
  return status([&] { delta::backward(*d, *r); });
}

// For tests: the functions of vec.h on n numbers, n a multiple of the lanes.
EXPORT int bestiary_elementwise(i64 n, i64 which, const float* x, float* y) {
  for (i64 i = 0; i < n; i += W) {
    vf v = load(x + i);
    store(y + i, which == 0 ? exp(v) : which == 1 ? sigmoid(v) : which == 2 ? softplus(v) : which == 3 ? silu(v) : exp2(v));
  }
  return 0;
}

EXPORT i64 bestiary_linear_attention_starts(i64 batch, i64 time, i64 heads, i64 keys, i64 columns) {
  return batch * heads * linear::chunks(time) * linear::padded(keys, linear::ROWS) * linear::padded(columns, W);
}
EXPORT i64 bestiary_linear_attention_parts(i64 heads, i64 groups) { return linear::parts(heads, groups); }
EXPORT int bestiary_linear_attention_forward(const LinearAttention* s) { return status([&] { linear::forward(*s); }); }
EXPORT int bestiary_linear_attention_backward(const LinearAttention* s, const LinearAttentionBack* r) {
  return status([&] { linear::backward(*s, *r); });
}

EXPORT i64 bestiary_norm_parts(i64 rows, i64 groups) { return norm::parts(rows, groups); }
EXPORT int bestiary_norm_forward(const Norm* s) { return status([&] { norm::forward(*s); }); }
EXPORT int bestiary_norm_backward(const Norm* s, const NormBack* b) { return status([&] { norm::backward(*s, *b); }); }

EXPORT int bestiary_cross_entropy(const CrossEntropy* s) { return status([&] { cross_entropy::run(*s); }); }
