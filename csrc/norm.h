// The RMS norm with a weight and a gate before or after it, forward and backward.
//
//   h = x, or x silu(g) where the gate comes first;   y = w h / sqrt(mean(h^2) + eps), times silu(g) where it comes last
//
// Forward and backward read each row once; what two passes over a row share stays in the nearest cache.
#pragma once

#include <cmath>

#include "parallel.h"

extern "C" {
// A null pointer: not given. Rows of x, gate and dy lie in one piece each; strides in numbers.
struct Norm {
  i64 rows, channels, groups, first;  // groups: rows of the weight, which rows of x take in turn; first: the gate
  const float *x, *weight, *gate;
  i64 x_row, gate_row;
  float *y, *scales;  // (rows, channels); (rows): one over the roots
  double eps;
};
struct NormBack {
  const float* dy;
  i64 dy_row;
  float *dx, *dgate, *dweight;  // (rows, channels) twice; (parts, groups, channels), to be summed
};
}

namespace norm {

enum Gate { NONE, BEFORE, AFTER };
constexpr i64 PART = 64;  // rows whose gradients of the weight are summed by one thread, or as many as are groups

inline i64 part(i64 groups) { return (PART + groups - 1) / groups * groups; }
inline i64 parts(i64 rows, i64 groups) { return (rows + part(groups) - 1) / part(groups); }

// Calls with each vector of a row: where it begins, and its lanes.
template <class Body>
inline void each(i64 channels, Body body) {
  i64 i = 0;
  for (; i + W <= channels; i += W) body(i, W);
  if (i < channels) body(i, static_cast<int>(channels - i));
}

template <int GATE>
inline void row(const Norm& s, i64 r, float* h) {
  const float *x = s.x + r * s.x_row, *g = s.gate + (GATE ? r * s.gate_row : 0);
  const float* w = s.weight ? s.weight + r % s.groups * s.channels : nullptr;
  float* y = s.y + r * s.channels;
  vf squares = {};
  each(s.channels, [&](i64 i, int n) {
    vf v = load(x + i, n);
    if (GATE == BEFORE) store(h + i, v = v * silu(load(g + i, n)));
    squares += v * v;
  });
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(sum(squares)) / s.channels + s.eps));
  s.scales[r] = scale;
  each(s.channels, [&](i64 i, int n) {
    vf v = (GATE == BEFORE ? load(h + i) : load(x + i, n)) * scale;
    if (w) v = v * load(w + i, n);
    if (GATE == AFTER) v = v * silu(load(g + i, n));
    store(y + i, v, n);
  });
}

// e: the gradient of h / root; then that of h is scale (e - h scale^2 mean(e h)).
template <int GATE>
inline void back(const Norm& s, const NormBack& b, i64 r, float* dw, float* buffer) {
  const float *x = s.x + r * s.x_row, *g = s.gate + (GATE ? r * s.gate_row : 0), *dy = b.dy + r * b.dy_row;
  const float* w = s.weight ? s.weight + r % s.groups * s.channels : nullptr;
  float *dx = b.dx + r * s.channels, *dg = b.dgate + (GATE ? r * s.channels : 0);
  float *e = buffer, *gate = e + s.channels + W, *slope = gate + s.channels + W;
  const float scale = s.scales[r];
  vf products = {};
  each(s.channels, [&](i64 i, int n) {
    vf h = load(x + i, n), d = load(dy + i, n), factor = w ? load(w + i, n) : all(1);
    if (GATE) {
      const vf z = load(g + i, n), open = sigmoid(z), passed = z * open, steep = silu_slope(z, open);
      if (GATE == BEFORE) store(gate + i, passed), store(slope + i, steep), h = h * passed;
      if (GATE == AFTER) store(dg + i, d * factor * h * scale * steep, n), d = d * passed;
    }
    if (dw) store(dw + i, load(dw + i, n) + d * h * scale, n);
    d = d * factor;
    store(e + i, d);
    products += d * h;
  });
  const float share = scale * scale * sum(products) / static_cast<float>(s.channels);
  each(s.channels, [&](i64 i, int n) {
    const vf v = load(x + i, n);
    if (GATE == BEFORE) {
      const vf open = load(gate + i), d = (load(e + i) - v * open * share) * scale;
      store(dx + i, d * open, n);
      store(dg + i, d * v * load(slope + i), n);
    } else {
      store(dx + i, (load(e + i) - v * share) * scale, n);
    }
  });
}

inline int kind(const Norm& s) { return !s.gate ? NONE : s.first ? BEFORE : AFTER; }

void forward(const Norm& s) {
  const i64 size = part(s.groups);
  parallel(parts(s.rows, s.groups), 8 * s.rows * s.channels, s.channels + W, [&](float* buffer, i64 item) {
    const i64 end = (item + 1) * size < s.rows ? (item + 1) * size : s.rows;
    for (i64 r = item * size; r < end; r++)
      kind(s) == NONE ? row<NONE>(s, r, buffer) : kind(s) == BEFORE ? row<BEFORE>(s, r, buffer) : row<AFTER>(s, r, buffer);
  });
}

void backward(const Norm& s, const NormBack& b) {
  const i64 size = part(s.groups), whole = s.groups * s.channels;
  parallel(parts(s.rows, s.groups), 16 * s.rows * s.channels, 3 * (s.channels + W), [&](float* buffer, i64 item) {
    const i64 end = (item + 1) * size < s.rows ? (item + 1) * size : s.rows;
    float* sums = b.dweight && s.weight ? b.dweight + item * whole : nullptr;
    for (i64 i = 0; sums && i < whole; i++) sums[i] = 0;
    for (i64 r = item * size; r < end; r++) {
      float* dw = sums ? sums + r % s.groups * s.channels : nullptr;
      kind(s) == NONE ? back<NONE>(s, b, r, dw, buffer)
                      : kind(s) == BEFORE ? back<BEFORE>(s, b, r, dw, buffer) : back<AFTER>(s, b, r, dw, buffer);
    }
  });
}

}  // namespace norm
