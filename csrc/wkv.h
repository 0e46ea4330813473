// RWKV-4's WKV operator, forward and backward.
//
//   y_t = (n + e^{u + k - m} v) / (d + e^{u + k - m});   n', d' = e^w n + e^{k - m} v, e^w d + e^{k - m}
//
// with n, d and m from before the step: the sums over the past in units of e^m. Nothing but their size depends on m, so it
// stays where it is as long as d keeps near 1: a step is then one exponential. Steps are tried so a chunk at a time; where
// a key is too large for m, or d too small, the chunk is done again with care: there, the lanes that need it get the m that
// is the whole number nearest to their largest exponent. Whole numbers have exact differences, and nothing drifts.
//
// A panel of channels runs through time. The forward pass saves the states before each chunk, the backward pass computes
// those within it anew.
#pragma once

#include "parallel.h"

extern "C" {
struct Wkv {
  i64 batch, time, channels;
  const float *k, *v, *w, *u;       // (batch, time, channels) twice, (channels) twice
  const float *num, *den, *max;     // (batch, channels)
  i64 k_batch, k_time, v_batch, v_time;
  const i64* lengths;
  float *y, *new_num, *new_den, *new_max;
  float* starts;                    // (batch, chunks, 3, channels): n, d and m before each chunk, or null
};
struct WkvBack {
  const float *dy, *dnew_num, *dnew_den, *dnew_max;
  i64 dy_batch, dy_time;
  float *dk, *dv;                   // (batch, time, channels)
  float *dw, *du;                   // (batch, channels): parts to be summed
  float *dnum, *dden, *dmax;        // (batch, channels)
};
}

namespace wkv {

constexpr int T = 16;            // steps of a chunk
constexpr int P = 64 / W;        // vectors of a panel
constexpr float FAR = 12;        // a key may be so much larger than m: its rounding then costs e^k less than 2^-20
constexpr float SMALL = 6.1e-6f;  // d is not smaller: e^-12
constexpr float BONUS = 20;      // e^u serves for bonuses up to this size

inline i64 chunks(i64 time) { return (time + T - 1) / T; }

struct State {
  vf n[P], d[P], m[P];
};

// What the backward pass needs of each step: d and n / d before it, the factors of both and of the new value, 1 / (the
// denominator of y), the share of the value itself in y, and 1 / d after it.
struct Kept {
  vf d[T][P], mean[T][P], past[T][P], now[T][P], inverse[T][P], share[T][P], fresh[T][P];
};

inline vf mean(vf n, vf d) { return d == vf{} ? vf{} : n / d; }

// Some whole number near x; x itself where it is so large that all numbers are, or nearly.
inline vf whole(vf x) {
  const float magic = 12582912.0f, large = 4194304.0f;  // 1.5 * 2^23 and 2^22
  const vf near = (x + magic) - magic;
  return ((x < all(large)) & (x > all(-large))) ? near : x;
}
// A bound of log(x) from above for x > 0, at most ln 2 too large; at 0 something below -87.
inline vf roughly_log(vf x) {
  const vi exponent = ((bits(x) >> 23) & 255) - 126;
  return __builtin_convertvector(exponent, vf) * 0.693147181f;
}

template <bool Whole>
struct Panel {
  i64 b, first, end, channels;  // row, first channel, length, channels from there on
  vf w[P] = {}, u[P] = {}, decay[P], bonus[P];

  Panel(const Wkv& s, i64 b, i64 panel)
      : b(b), first(panel * P * W), end(s.lengths ? s.lengths[b] : s.time), channels(s.channels - first) {
    for (int p = 0; p < vectors(); p++) {
      w[p] = load(s.w + first + p * W, lanes(p));
      u[p] = load(s.u + first + p * W, lanes(p));
    }
    for (int p = 0; p < P; p++) decay[p] = exp(w[p]), bonus[p] = exp(u[p]);
  }
  int vectors() const { return Whole ? P : static_cast<int>((channels + W - 1) / W); }
  int lanes(int p) const { return Whole || channels - p * W >= W ? W : static_cast<int>(channels - p * W); }

  void read(const float* from, vf* to) const {
    for (int p = 0; p < vectors(); p++) to[p] = load(from + first + p * W, lanes(p));
  }
  void write(const vf* from, float* to) const {
    for (int p = 0; p < vectors(); p++) store(to + first + p * W, from[p], lanes(p));
  }

  // A chunk of n steps: y into `out`, unless null, or what is kept. Returns whether lanes needed care, which they get, and
  // the results are of use, only if Careful.
  template <bool Careful>
  bool steps(const Wkv& s, i64 t0, int n, State& h, float* out, Kept* kept) const {
    vi care = {};
    for (int t = 0; t < n; t++) {
      const float* k_t = s.k + b * s.k_batch + (t0 + t) * s.k_time + first;
      const float* v_t = s.v + b * s.v_batch + (t0 + t) * s.v_time + first;
      for (int p = 0; p < vectors(); p++) {
        const vf k = load(k_t + p * W, lanes(p)), v = load(v_t + p * W, lanes(p));
        vf x = k - h.m[p], past = decay[p], now = exp(x), mine = bonus[p] * now;
        vf inverse = 1.0f / (h.d[p] + mine), share = mine * inverse, d = past * h.d[p] + now;
        const vi hard = (x > all(FAR)) | (d < all(SMALL)) | (h.d[p] < all(SMALL)) | (u[p] > all(BONUS)) | (u[p] < all(-BONUS));
        if constexpr (Careful) {
          const vf a = x + u[p], e = exp(a > vf{} ? -a : a);  // the smaller of the two weights, as a share of the larger
          const vf total = 1.0f / (a > vf{} ? e * h.d[p] + 1.0f : h.d[p] + e);
          inverse = hard ? (a > vf{} ? e * total : total) : inverse;
          share = hard ? (a > vf{} ? total : e * total) : share;
          const vf m = hard ? whole(larger(h.m[p] + w[p] + roughly_log(h.d[p]), k)) : h.m[p];
          past = exp(h.m[p] - m + w[p]);
          now = exp(k - m);
          d = past * h.d[p] + now;
          h.m[p] = m;
        } else {
          care |= hard;
        }
        if (out) store(out + (t0 + t) * s.channels + first + p * W, h.n[p] * inverse + share * v, lanes(p));
        if (kept) {
          kept->d[t][p] = h.d[p], kept->mean[t][p] = mean(h.n[p], h.d[p]), kept->past[t][p] = past, kept->now[t][p] = now;
          kept->inverse[t][p] = inverse, kept->share[t][p] = share, kept->fresh[t][p] = 1.0f / d;
        }
        h.n[p] = past * h.n[p] + now * v;
        h.d[p] = d;
      }
    }
    int any = 0;
    for (int i = 0; i < W; i++) any |= care[i];
    return any;
  }
  void chunk(const Wkv& s, i64 t0, int n, State& h, float* out, Kept* kept) const {
    const State before = h;
    if (!steps<false>(s, t0, n, h, out, kept)) return;
    h = before;
    steps<true>(s, t0, n, h, out, kept);
  }
  int length(i64 t0) const { return static_cast<int>(end - t0 < T ? end - t0 : T); }
};

template <bool Whole>
void forward(const Wkv& s, const Panel<Whole>& r) {
  State h = {};
  const i64 edge = r.b * s.channels;
  r.read(s.num + edge, h.n), r.read(s.den + edge, h.d), r.read(s.max + edge, h.m);
  float* y = s.y + edge * s.time;
  for (i64 t0 = 0; t0 < r.end; t0 += T) {
    if (s.starts) {
      float* to = s.starts + (r.b * chunks(s.time) + t0 / T) * 3 * s.channels;
      r.write(h.n, to), r.write(h.d, to + s.channels), r.write(h.m, to + 2 * s.channels);
    }
    r.chunk(s, t0, r.length(t0), h, y, nullptr);
  }
  const vf zero[P] = {};
  for (i64 t = r.end; t < s.time; t++) r.write(zero, y + t * s.channels);
  r.write(h.n, s.new_num + edge), r.write(h.d, s.new_den + edge), r.write(h.m, s.new_max + edge);
}

// The gradients of n and d are carried as gn and gm: what n gains, and what d gains where n / d stays. Both sums then are of
// like terms: differences between a value and a mean are taken directly, where gn v + gd would be one of large parts.
template <bool Whole>
void backward(const Wkv& s, const WkvBack& g, const Panel<Whole>& r, Kept& kept) {
  const i64 edge = r.b * s.channels, row = edge * s.time;
  const vf zero[P] = {};
  vf gn[P] = {}, gd[P] = {}, gm[P] = {}, dw[P] = {}, du[P] = {};
  r.read(g.dnew_num + edge, gn), r.read(g.dnew_den + edge, gd), r.read(g.dnew_max + edge, gm);
  for (i64 t = r.end; t < s.time; t++) r.write(zero, g.dk + row + t * s.channels), r.write(zero, g.dv + row + t * s.channels);
  const i64 last = (r.end + T - 1) / T * T - T;
  for (i64 t0 = last; t0 >= 0; t0 -= T) {
    State h = {};
    const float* from = s.starts + (r.b * chunks(s.time) + t0 / T) * 3 * s.channels;
    r.read(from, h.n), r.read(from + s.channels, h.d), r.read(from + 2 * s.channels, h.m);
    const int n = r.length(t0);
    r.chunk(s, t0, n, h, nullptr, &kept);
    if (t0 == last)
      for (int p = 0; p < P; p++) gm[p] = gn[p] * mean(h.n[p], h.d[p]) + gd[p];
    vf sum_w[P] = {}, sum_u[P] = {};
    for (int t = n - 1; t >= 0; t--) {
      const float* v_t = s.v + r.b * s.v_batch + (t0 + t) * s.v_time + r.first;
      const float* dy_t = g.dy + r.b * g.dy_batch + (t0 + t) * g.dy_time + r.first;
      const i64 at = row + (t0 + t) * s.channels + r.first;
      for (int p = 0; p < r.vectors(); p++) {
        const vf dy = load(dy_t + p * W, r.lanes(p)), off = kept.mean[t][p] - load(v_t + p * W, r.lanes(p));
        const vf d = kept.d[t][p], past = kept.past[t][p], now = kept.now[t][p], fresh = kept.fresh[t][p];
        const vf through = dy * kept.inverse[t][p], mine = dy * kept.share[t][p], moved = gn[p] * fresh * off;
        const vf direct = mine * (d * kept.inverse[t][p]) * off;
        store(g.dk + at + p * W, now * (gm[p] - moved * (past * d)) - direct, r.lanes(p));
        store(g.dv + at + p * W, now * gn[p] + mine, r.lanes(p));
        sum_u[p] -= direct;
        gm[p] = past * (gm[p] + moved * now);
        sum_w[p] += gm[p] * d;
        gm[p] += through * kept.share[t][p] * off;
        gn[p] = past * gn[p] + through;
      }
    }
    for (int p = 0; p < P; p++) dw[p] += sum_w[p], du[p] += sum_u[p];
  }
  if (r.end)  // n and d count in units of e^m
    for (int p = 0; p < P; p++) gd[p] = gm[p] - gn[p] * kept.mean[0][p], gm[p] = gm[p] * kept.d[0][p];
  r.write(gn, g.dnum + edge), r.write(gd, g.dden + edge), r.write(gm, g.dmax + edge);
  r.write(dw, g.dw + edge), r.write(du, g.du + edge);
}

// run(panel, buffer) for every panel of every row.
template <class Run>
void panels(const Wkv& s, i64 operations, i64 floats, Run run) {
  const i64 n = (s.channels + P * W - 1) / (P * W);
  parallel(s.batch * n, operations * s.batch * s.time * s.channels, floats, [&](float* buffer, i64 item) {
    const i64 b = item / n, panel = item % n;
    if ((panel + 1) * P * W <= s.channels) run(Panel<true>(s, b, panel), buffer);
    else run(Panel<false>(s, b, panel), buffer);
  });
}

void forward(const Wkv& s) {
  panels(s, 40, 0, [&](const auto& panel, float*) { forward(s, panel); });
}
void backward(const Wkv& s, const WkvBack& g) {
  panels(s, 80, sizeof(Kept) / 4, [&](const auto& panel, float* buffer) {
    backward(s, g, panel, *reinterpret_cast<Kept*>(buffer));
  });
}

}  // namespace wkv
