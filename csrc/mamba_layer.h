// One step of a whole Mamba layer for few rows: x + out_proj(scan(conv(in_proj(norm(x))))), in one parallel region.
//
// Threads share each product by its panels and each channel-wise part by its channels, with a barrier in between.
#pragma once

#include "matvec.h"

extern "C" {
struct MambaLayer {
  i64 width, channels, states, rank, taps;
  float norm_eps;
  const float* norm;                      // (width)
  const Matrix *in, *x, *dt, *out;        // in: to x and z; x: to dt, B, C; dt: with the bias of the step size
  const float *conv, *conv_bias;          // (taps, channels), (channels)
  const float *A, *D;                     // (states, channels), (channels)
};
}

namespace mamba_layer {

using matvec::GROUP;

inline i64 padded(i64 n) { return (n + GROUP - 1) / GROUP * GROUP; }

// Rows of x ready for a product, in `to`, or x itself where it may be read as it is.
inline const float* ready(const Matrix& m, i64 rows, const float* x, i64 x_row, float* to) {
  if (rows == 1 && m.inputs % GROUP == 0) return x;
  matvec::interleave(m, rows, x, x_row, to);
  return to;
}

// This thread's panels of a product.
inline void share(const Matrix& m, i64 rows, const float* given, float* y, i64 y_row, int thread, int threads) {
  const i64 all = matvec::panels(m.outputs), first = all * thread / threads, last = all * (thread + 1) / threads;
  const i64 length = padded(m.inputs);
  for (i64 p = first; p < last; p++) matvec::any_panel(m, p, rows, length, given, y, y_row);
}

void step(const MambaLayer& l, i64 rows, const float* input, const float* history, const float* h, float* output,
          float* new_history, float* new_h) {
  const i64 C = l.channels, N = l.states, K = l.taps, blocks = (C + W - 1) / W;
  const i64 projected = l.rank + 2 * N, longest = padded(l.width > C ? l.width : C);
  // shared: in_proj's output, the convolved, dt B C, dt, what goes to out_proj
  Buffer shared(rows * (2 * C + C + projected + C + C));
  float *xz = shared, *conv = xz + rows * 2 * C, *parts = conv + rows * C, *dt = parts + rows * projected, *y = dt + rows * C;
  int threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    int thread = 0, count = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num(), count = omp_get_num_threads();
#endif
    Buffer own(rows * (longest + l.width));
    float *given = own, *normed = given + rows * longest;
    for (i64 r = 0; r < rows; r++) {
      const float* x = input + r * l.width;
      float squares = 0;
      vf sum_lanes = {};
      i64 i = 0;
      for (; i + W <= l.width; i += W) sum_lanes += load(x + i) * load(x + i);
      for (; i < l.width; i++) squares += x[i] * x[i];
      const float scale = 1.0f / std::sqrt((squares + sum(sum_lanes)) / static_cast<float>(l.width) + l.norm_eps);
      for (i = 0; i < l.width; i++) normed[r * l.width + i] = x[i] * scale * l.norm[i];
    }
    share(*l.in, rows, ready(*l.in, rows, normed, l.width, given), xz, 2 * C, thread, count);
#ifdef _OPENMP
#pragma omp barrier
#endif
    const i64 from = blocks * thread / count, to = blocks * (thread + 1) / count;
    for (i64 r = 0; r < rows; r++)
      for (i64 b = from; b < to; b++) {
        const i64 c = b * W;
        const int lanes = static_cast<int>(C - c < W ? C - c : W);
        const float* old = history + r * (K - 1) * C + c;
        float* kept = new_history + r * (K - 1) * C + c;
        vf x = load(xz + r * 2 * C + c, lanes), s = load(l.conv_bias + c, lanes) + load(l.conv + (K - 1) * C + c, lanes) * x;
        for (i64 k = 0; k < K - 1; k++) {
          vf before = load(old + k * C, lanes);
          s += load(l.conv + k * C + c, lanes) * before;
          if (k) store(kept + (k - 1) * C, before, lanes);
        }
        if (K > 1) store(kept + (K - 2) * C, x, lanes);
        store(conv + r * C + c, silu(s), lanes);
      }
#ifdef _OPENMP
#pragma omp barrier
#endif
    share(*l.x, rows, ready(*l.x, rows, conv, C, given), parts, projected, thread, count);
#ifdef _OPENMP
#pragma omp barrier
#endif
    share(*l.dt, rows, ready(*l.dt, rows, parts, projected, given), dt, C, thread, count);
#ifdef _OPENMP
#pragma omp barrier
#endif
    for (i64 r = 0; r < rows; r++) {
      const float *B = parts + r * projected + l.rank, *out = B + N;
      for (i64 b = from; b < to; b++) {
        const i64 c = b * W;
        const int lanes = static_cast<int>(C - c < W ? C - c : W);
        vf d = softplus(load(dt + r * C + c, lanes)), x = load(conv + r * C + c, lanes), dx = d * x;
        vf sum = load(l.D + c, lanes) * x;
        for (i64 n = 0; n < N; n++) {
          const i64 at = (r * N + n) * C + c;
          vf state = load(h + at, lanes) * exp(d * load(l.A + n * C + c, lanes)) + dx * B[n];
          store(new_h + at, state, lanes);
          sum += state * out[n];
        }
        store(y + r * C + c, sum * silu(load(xz + r * 2 * C + C + c, lanes)), lanes);
      }
    }
#ifdef _OPENMP
#pragma omp barrier
#endif
    share(*l.out, rows, ready(*l.out, rows, y, C, given), output, l.width, thread, count);
#ifdef _OPENMP
#pragma omp barrier
#endif
    const i64 all = rows * l.width, start = all * thread / count, end = all * (thread + 1) / count;
    for (i64 i = start; i < end; i++) output[i] += input[i];
  }
}

}  // namespace mamba_layer
