// The causal depthwise convolution with few taps, with its bias and SiLU, forward and backward.
//
//   s_t = sum_k w[k] x_{t - K + 1 + k} + b;   y_t = s_t or silu(s_t);   after: the last K - 1 inputs of each row
//
// A panel of channels, some vectors wide, runs through time: a step reads its last K inputs from the nearest cache, also
// where the steps are a power of two apart. Inputs before the segment come from `before`; a row ends at its length.
// 2, 3 and 4 taps have code of their own.
#pragma once

#include "parallel.h"

extern "C" {
struct Convolution {
  i64 batch, time, channels, taps, silu;
  const float *x, *weight, *bias, *before;  // weight: (channels, taps); before: (batch, taps - 1, channels)
  i64 x_batch, x_time;
  const i64* lengths;
  float *y, *after;  // (batch, time, channels), (batch, taps - 1, channels)
};
struct ConvolutionBack {
  const float *dy, *dafter;  // dafter may be null
  i64 dy_batch, dy_time;
  float *dx, *dbefore, *dweight, *dbias;  // as x, before, (batch, taps, channels), (batch, channels): the last two in parts
};
}

namespace short_convolution {

constexpr int MOST = 16;       // taps
constexpr int T = 64;          // steps of an item of the forward pass, over one row or several short ones
constexpr int CHUNK = 32;      // steps of a chunk of the backward pass
constexpr int PANEL = 64 / W;  // vectors of a panel, forward
constexpr int BACK = 128 / W;  // and backward

inline i64 panels(const Convolution& c, i64 vectors) { return (c.channels + vectors * W - 1) / (vectors * W); }
inline i64 real(const Convolution& c, i64 b) { return c.lengths ? c.lengths[b] : c.time; }

// A panel of P vectors: its weights, and where the inputs of a row are. K taps, or as many as there are where K is 0; Whole:
// all P vectors are full of channels.
template <int P, int K, bool Whole>
struct Panel {
  static constexpr int HELD = K ? K : MOST;
  const Convolution& c;
  i64 first;  // channel
  vf w[HELD][P] = {}, bias[P] = {};

  Panel(const Convolution& c, i64 panel) : c(c), first(panel * P * W) {
    for (int p = 0; p < vectors(); p++) {
      if (c.bias) bias[p] = load(c.bias + first + p * W, lanes(p));
      float tap[HELD][W] = {};
      const float* from = c.weight + (first + p * W) * taps();
      for (int i = 0; i < lanes(p); i++)
        for (int k = 0; k < taps(); k++) tap[k][i] = from[i * taps() + k];
      for (int k = 0; k < taps(); k++) w[k][p] = load(tap[k]);
    }
  }
  int taps() const { return K ? K : static_cast<int>(c.taps); }
  int vectors() const { return Whole ? P : static_cast<int>((c.channels - first + W - 1) / W); }
  int lanes(int p) const {
    const i64 rest = c.channels - first - p * W;
    return Whole || rest >= W ? W : static_cast<int>(rest);
  }
  // The inputs of a step; steps before 0 are those of the history.
  const float* input(i64 b, i64 t) const {
    if (t >= 0) return c.x + b * c.x_batch + t * c.x_time + first;
    return c.before + (b * (taps() - 1) + taps() - 1 + t) * c.channels + first;
  }
  void inputs(i64 b, i64 t, const float** x) const {
    for (int k = 0; k < taps(); k++) x[k] = input(b, t - taps() + 1 + k);
  }
  vf sum(const float* const* x, int p) const {
    vf s = bias[p];
    for (int k = 0; k < taps(); k++) s += w[k][p] * load(x[k] + p * W, lanes(p));
    return s;
  }
};

template <int K, bool Whole>
void forward(const Convolution& c, i64 panel, i64 b0, i64 b1, i64 t0, i64 t1) {
  const Panel<PANEL, K, Whole> r(c, panel);
  for (i64 b = b0; b < b1; b++) {
    const i64 end = real(c, b), last = t1 < end ? t1 : end;
    const float* x[r.HELD];
    float* y = c.y + b * c.time * c.channels + r.first;
    for (i64 t = t0; t < last; t++) {
      r.inputs(b, t, x);
      for (int p = 0; p < r.vectors(); p++) {
        const vf s = r.sum(x, p);
        store(y + t * c.channels + p * W, c.silu ? silu(s) : s, r.lanes(p));
      }
    }
    for (i64 t = last > t0 ? last : t0; t < t1; t++)
      for (int p = 0; p < r.vectors(); p++) store(y + t * c.channels + p * W, vf{}, r.lanes(p));
    if (t0 == 0)
      for (int k = 0; k < r.taps() - 1; k++) {
        const float* from = r.input(b, end - r.taps() + 1 + k);
        float* to = c.after + (b * (r.taps() - 1) + k) * c.channels + r.first;
        for (int p = 0; p < r.vectors(); p++) store(to + p * W, load(from + p * W, r.lanes(p)), r.lanes(p));
      }
  }
}

// The gradients of the sums s, K - 1 steps of them from before a chunk and the chunk's own.
using Flow = vf[CHUNK + MOST][BACK];

template <int K, bool Whole>
void backward(const Convolution& c, const ConvolutionBack& g, i64 panel, i64 b, Flow& flow) {
  const Panel<BACK, K, Whole> r(c, panel);
  const i64 end = real(c, b);
  const int old = r.taps() - 1;
  vf dw[r.HELD][BACK] = {}, db[BACK] = {};
  for (int t = 0; t < old; t++)
    for (int p = 0; p < BACK; p++) flow[t][p] = vf{};
  for (i64 t0 = 0; t0 < end + old; t0 += CHUNK) {
    const int n = static_cast<int>(end + old - t0 < CHUNK ? end + old - t0 : CHUNK);
    const int own = static_cast<int>(end - t0 < n ? (end > t0 ? end - t0 : 0) : n);
    for (int i = 0; i < own; i++) {
      const float *x[r.HELD], *dy = g.dy + b * g.dy_batch + (t0 + i) * g.dy_time + r.first;
      r.inputs(b, t0 + i, x);
      for (int p = 0; p < r.vectors(); p++) {
        vf f = load(dy + p * W, r.lanes(p));
        if (c.silu) {
          const vf s = r.sum(x, p);
          f = f * silu_slope(s, sigmoid(s));
        }
        flow[old + i][p] = f;
        db[p] += f;
        for (int k = 0; k < r.taps(); k++) dw[k][p] += f * load(x[k] + p * W, r.lanes(p));
      }
    }
    for (int i = own; i < n; i++)
      for (int p = 0; p < BACK; p++) flow[old + i][p] = vf{};
    // step at reads the gradients of at .. at + K - 1, all of which are known now
    for (int i = 0; i < n; i++) {
      const i64 at = t0 + i - old, kept = at - (end - old);  // its place among the last inputs
      const float* more = g.dafter && kept >= 0 ? g.dafter + (b * old + kept) * c.channels + r.first : nullptr;
      float* to = at >= 0 ? g.dx + (b * c.time + at) * c.channels : g.dbefore + (b * old + old + at) * c.channels;
      for (int p = 0; p < r.vectors(); p++) {
        vf d = more ? load(more + p * W, r.lanes(p)) : vf{};
        for (int k = 0; k < r.taps(); k++) d += r.w[k][p] * flow[i + old - k][p];
        store(to + r.first + p * W, d, r.lanes(p));
      }
    }
    for (int t = 0; t < old; t++)
      for (int p = 0; p < BACK; p++) flow[t][p] = flow[n + t][p];
  }
  for (int p = 0; p < r.vectors(); p++) {
    for (i64 t = end; t < c.time; t++) store(g.dx + (b * c.time + t) * c.channels + r.first + p * W, vf{}, r.lanes(p));
    for (int k = 0; k < r.taps(); k++)
      store(g.dweight + (b * r.taps() + k) * c.channels + r.first + p * W, dw[k][p], r.lanes(p));
    store(g.dbias + b * c.channels + r.first + p * W, db[p], r.lanes(p));
  }
}

// run<K, Whole>() for the taps that there are.
template <class Run>
void choose(const Convolution& c, bool whole, Run run) {
  auto with = [&]<int K>() { whole ? run.template operator()<K, true>() : run.template operator()<K, false>(); };
  switch (c.taps) {
    case 2: return with.template operator()<2>();
    case 3: return with.template operator()<3>();
    case 4: return with.template operator()<4>();
    default: return with.template operator()<0>();
  }
}
inline bool whole(const Convolution& c, i64 panel, i64 vectors) { return (panel + 1) * vectors * W <= c.channels; }

void forward(const Convolution& c) {
  const i64 pieces = c.time ? (c.time + T - 1) / T : 1, n = panels(c, PANEL);
  const i64 rows = c.time > T / 2 ? 1 : T / (c.time ? c.time : 1), groups = (c.batch + rows - 1) / rows;
  parallel(groups * pieces * n, c.batch * c.time * c.channels * (c.taps + 20), 0, [&](float*, i64 item) {
    const i64 panel = item % n, t0 = item / n % pieces * T, b0 = item / n / pieces * rows;
    const i64 b1 = b0 + rows < c.batch ? b0 + rows : c.batch, t1 = t0 + T < c.time ? t0 + T : c.time;
    choose(c, whole(c, panel, PANEL), [&]<int K, bool Whole>() { forward<K, Whole>(c, panel, b0, b1, t0, t1); });
  });
}

void backward(const Convolution& c, const ConvolutionBack& g) {
  const i64 n = panels(c, BACK);
  parallel(c.batch * n, 3 * c.batch * c.time * c.channels * (c.taps + 20), sizeof(Flow) / 4, [&](float* buffer, i64 item) {
    Flow& flow = *reinterpret_cast<Flow*>(buffer);
    const i64 panel = item % n, b = item / n;
    choose(c, whole(c, panel, BACK), [&]<int K, bool Whole>() { backward<K, Whole>(c, g, panel, b, flow); });
  });
}

}  // namespace short_convolution
