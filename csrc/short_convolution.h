// The causal depthwise convolution with few taps, with its bias and SiLU, forward and backward.
//
//   s_t = sum_k w[k] x_{t - K + 1 + k} + b;   y_t = s_t or silu(s_t);   after: the last K - 1 inputs of each row
//
// W channels are the lanes of a vector. Inputs before the segment come from `before`; a row ends at its length.
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

constexpr int MOST = 16;  // taps
constexpr int T = 64;     // steps of an item of the forward pass

// One block of channels of one row.
struct Row {
  const Convolution& c;
  i64 b, channel, end;
  int lanes;
  vf w[MOST], bias;

  Row(const Convolution& c, i64 b, i64 block) : c(c), b(b), channel(block * W) {
    const i64 rest = c.channels - channel;
    lanes = static_cast<int>(rest < W ? rest : W);
    end = c.lengths ? c.lengths[b] : c.time;
    bias = c.bias ? load(c.bias + channel, lanes) : vf{};
    for (i64 k = 0; k < c.taps; k++) {
      float tap[W] = {};
      for (int i = 0; i < lanes; i++) tap[i] = c.weight[(channel + i) * c.taps + k];
      w[k] = load(tap);
    }
  }
  // The input of a step; steps before 0 are those of the history.
  vf input(i64 t) const {
    if (t >= 0) return load(c.x + b * c.x_batch + t * c.x_time + channel, lanes);
    return load(c.before + (b * (c.taps - 1) + c.taps - 1 + t) * c.channels + channel, lanes);
  }
  vf sum(i64 t) const {
    vf s = bias;
    for (i64 k = 0; k < c.taps; k++) s += w[k] * input(t - c.taps + 1 + k);
    return s;
  }
};

void forward(const Convolution& c) {
  const i64 blocks = (c.channels + W - 1) / W, pieces = c.time ? (c.time + T - 1) / T : 1;
  parallel(c.batch * pieces * blocks, c.batch * c.time * c.channels * (c.taps + 20), 0, [&](float*, i64 item) {
    const i64 block = item % blocks, piece = item / blocks % pieces;
    Row r(c, item / blocks / pieces, block);
    for (i64 t = piece * T; t < (piece + 1) * T && t < c.time; t++) {
      vf s = {};
      if (t < r.end) s = r.sum(t), s = c.silu ? silu(s) : s;
      store(c.y + (r.b * c.time + t) * c.channels + r.channel, s, r.lanes);
    }
    if (piece == 0)
      for (i64 k = 0; k < c.taps - 1; k++)
        store(c.after + (r.b * (c.taps - 1) + k) * c.channels + r.channel, r.input(r.end - c.taps + 1 + k), r.lanes);
  });
}

void backward(const Convolution& c, const ConvolutionBack& g) {
  const i64 blocks = (c.channels + W - 1) / W, K = c.taps;
  parallel(c.batch * blocks, 3 * c.batch * c.time * c.channels * (K + 20), 0, [&](float*, i64 item) {
    Row r(c, item / blocks, item % blocks);
    vf flow[MOST] = {}, dw[MOST] = {}, db = {};  // flow: of the last K steps, step t in place t mod K
    for (i64 t = 0; t < r.end + K - 1; t++) {
      vf f = {};
      if (t < r.end) {
        f = load(g.dy + r.b * g.dy_batch + t * g.dy_time + r.channel, r.lanes);
        if (c.silu) {
          const vf s = r.sum(t);
          f = f * silu_slope(s, sigmoid(s));
        }
        for (i64 k = 0; k < K; k++) dw[k] += f * r.input(t - K + 1 + k);
        db += f;
      }
      flow[t % K] = f;
      // all steps that read input p are known now
      const i64 p = t - K + 1;
      vf d = {};
      for (i64 k = 0; k < K; k++)
        if (p + K - 1 - k >= 0) d += r.w[k] * flow[(p + K - 1 - k) % K];
      const i64 kept = p - (r.end - K + 1);  // its place among the last inputs
      if (g.dafter && kept >= 0 && kept < K - 1)
        d += load(g.dafter + (r.b * (K - 1) + kept) * c.channels + r.channel, r.lanes);
      if (p >= 0) store(g.dx + (r.b * c.time + p) * c.channels + r.channel, d, r.lanes);
      else store(g.dbefore + (r.b * (K - 1) + K - 1 + p) * c.channels + r.channel, d, r.lanes);
    }
    for (i64 t = r.end; t < c.time; t++) store(g.dx + (r.b * c.time + t) * c.channels + r.channel, vf{}, r.lanes);
    for (i64 k = 0; k < K; k++) store(g.dweight + (r.b * K + k) * c.channels + r.channel, dw[k], r.lanes);
    store(g.dbias + r.b * c.channels + r.channel, db, r.lanes);
  });
}

}  // namespace short_convolution
