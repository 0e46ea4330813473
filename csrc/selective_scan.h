// The selective scan of Mamba, forward and backward.
//
//   d_t = softplus(dt_t + bias) gap_t;   h_t = exp(d_t A) h_{t-1} + d_t B_t u_t;   y_t = (C_t . h_t + D u_t) silu(z_t)
//
// W channels are the lanes of a vector; a block of them keeps its states in registers while time runs, at most 16 state
// numbers at once. Time goes in chunks: the forward pass saves the states before each chunk, the backward pass computes
// those within it anew. Nothing of size time * channels * state exists.
#pragma once

#include "parallel.h"

extern "C" {
// Sizes in numbers, strides in numbers; channels lie next to each other. A null pointer: not given.
struct Scan {
  i64 batch, time, channels, states, softplus;
  const float *u, *dt, *A, *B, *C, *D, *bias, *z, *gaps;  // A: (channels, states)
  i64 u_batch, u_time, dt_batch, dt_time, z_batch, z_time, b_batch, b_time, c_batch, c_time;
  const i64* lengths;   // (batch)
  const float* before;  // (batch, channels, states)
  float *y, *after;     // (batch, time, channels), (batch, channels, states)
  float* starts;        // (batch, chunks, blocks, states, W): states before each chunk, or null
};
struct ScanBack {
  const float *dy, *dafter;                // as y and after; dafter may be null
  i64 dy_batch, dy_time;
  float *du, *ddt, *dz;                    // (batch, time, channels)
  float *dB, *dC;                          // (groups, batch, time, states): parts to be summed
  float *dA, *dD, *dbias;                  // (batch, channels, states), (batch, channels), (batch, channels): likewise
  float* dbefore;                          // (batch, channels, states)
};
}

namespace scan {

constexpr int T = 32;      // steps of a chunk
constexpr int HELD = 16;   // state numbers held in registers at once
constexpr i64 P = 4;       // blocks of a panel
constexpr i64 GROUPS = 8;  // of channel blocks, each with a part of dB and dC: fixed, so that sums do not depend on threads

inline i64 blocks(i64 channels) { return (channels + W - 1) / W; }
inline i64 chunks(i64 time) { return (time + T - 1) / T; }

// What a chunk of a block of channels reads: its steps of d, d * u and u, one vector each.
struct Chunk {
  vf d[T], dx[T], x[T];
};

struct Place {
  i64 b, j;   // row, block
  int lanes;  // of the block that are channels
};

inline Place place(const Scan& s, i64 b, i64 j) {
  i64 rest = s.channels - j * W;
  return {b, j, static_cast<int>(rest < W ? rest : W)};
}
inline i64 real(const Scan& s, i64 b) { return s.lengths ? s.lengths[b] : s.time; }

// The same numbers `ahead` steps on, which is before or after this chunk, are wanted soon.
inline void read(const Scan& s, const Place& p, i64 t0, int n, i64 ahead, Chunk& c) {
  i64 d0 = p.j * W;
  vf bias = s.bias ? load(s.bias + d0, p.lanes) : vf{};
  for (int t = 0; t < n; t++) {
    const float* dt = s.dt + p.b * s.dt_batch + (t0 + t) * s.dt_time + d0;
    const float* u = s.u + p.b * s.u_batch + (t0 + t) * s.u_time + d0;
    soon(dt + ahead * s.dt_time);
    soon(u + ahead * s.u_time);
    vf d = load(dt, p.lanes) + bias;
    if (s.softplus) d = softplus(d);
    if (s.gaps) d = d * s.gaps[p.b * s.time + t0 + t];
    vf x = load(u, p.lanes);
    c.d[t] = d;
    c.x[t] = x;
    c.dx[t] = d * x;
  }
}

// A, or h, of a block: (states, W) from (channels, states), and back.
inline void gather(const float* from, i64 states, const Place& p, float* to) {
  for (i64 i = 0; i < states; i++)
    for (int k = 0; k < W; k++) to[i * W + k] = k < p.lanes ? from[(p.j * W + k) * states + i] : 0.0f;
}
// The same of A log2(e), for exp2.
inline void gather_rates(const float* from, i64 states, const Place& p, float* to) {
  gather(from, states, p, to);
  for (i64 i = 0; i < states; i++) store(to + i * W, load(to + i * W) * 1.44269504089f);
}
inline void scatter(const float* from, i64 states, const Place& p, float* to) {
  for (i64 i = 0; i < states; i++)
    for (int k = 0; k < p.lanes; k++) to[(p.j * W + k) * states + i] = from[i * W + k];
}

// N state numbers through a chunk: h changes, y gathers C_t . h_t.
template <int N>
inline void run(const Chunk& c, int n, const float* B, i64 b_time, const float* C, i64 c_time, const float* rate, float* h,
                vf* y) {
  vf state[N], a[N];
  for (int i = 0; i < N; i++) state[i] = load(h + i * W), a[i] = load(rate + i * W);
  for (int t = 0; t < n; t++) {
    const float *bt = B + t * b_time, *ct = C + t * c_time;
    vf even = y[t], odd = vf{};
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) {
      state[i] = state[i] * exp2(c.d[t] * a[i]) + c.dx[t] * bt[i];
      (i & 1 ? odd : even) += state[i] * ct[i];
    }
    y[t] = even + odd;
  }
  for (int i = 0; i < N; i++) store(h + i * W, state[i]);
}

// The same for any number of them: pieces of Most, and for what is left as few as there are sizes.
template <int Most, class Piece>
inline void pieces(i64 states, Piece piece, i64 i = 0) {
  for (; i + Most <= states; i += Most) piece.template operator()<Most>(i);
  if constexpr (Most > 1) pieces<Most / 2>(states, piece, i);
}

void forward(const Scan& s) {
  const i64 nb = blocks(s.channels), nc = chunks(s.time), N = s.states, np = (nb + P - 1) / P;
  // One item is a panel of blocks, which take turns within each chunk: what is read and written of a step lies together.
  parallel(s.batch * np, s.batch * s.time * s.channels * N, P * 2 * N * W, [&](float* buffer, i64 item) {
    const i64 b = item / np, j0 = item % np * P, j1 = j0 + P < nb ? j0 + P : nb;
    const i64 end = real(s, b);
    for (i64 j = j0; j < j1; j++) {
      Place p = place(s, b, j);
      float *rate = buffer + (j - j0) * 2 * N * W, *h = rate + N * W;
      gather_rates(s.A, N, p, rate);
      if (s.before) gather(s.before + b * s.channels * N, N, p, h);
      else std::memset(h, 0, 4 * N * W);
    }
    for (i64 k = 0; k < nc; k++) {
      const i64 t0 = k * T;
      const int n = static_cast<int>(end - t0 < T ? (end > t0 ? end - t0 : 0) : T);
      const float *B = s.B + b * s.b_batch + t0 * s.b_time, *C = s.C + b * s.c_batch + t0 * s.c_time;
      for (i64 j = j0; j < j1; j++) {
        Place p = place(s, b, j);
        float *rate = buffer + (j - j0) * 2 * N * W, *h = rate + N * W;
        if (s.starts) std::memcpy(s.starts + ((b * nc + k) * nb + j) * N * W, h, 4 * N * W);
        Chunk c;
        vf y[T];
        read(s, p, t0, n, T, c);
        vf skip = s.D ? load(s.D + j * W, p.lanes) : vf{};
        for (int t = 0; t < n; t++) y[t] = skip * c.x[t];
        pieces<HELD>(N, [&]<int M>(i64 i) { run<M>(c, n, B + i, s.b_time, C + i, s.c_time, rate + i * W, h + i * W, y); });
        float* out = s.y + (b * s.time + t0) * s.channels + j * W;
        for (int t = 0; t < T && t0 + t < s.time; t++) {
          soon(out + (t + T) * s.channels);
          vf v = t < n ? y[t] : vf{};
          if (s.z && t < n) {
            const float* z = s.z + b * s.z_batch + (t0 + t) * s.z_time + j * W;
            soon(z + T * s.z_time);
            v = v * silu(load(z, p.lanes));
          }
          store(out + t * s.channels, v, p.lanes);
        }
      }
    }
    for (i64 j = j0; j < j1; j++) scatter(buffer + (2 * (j - j0) + 1) * N * W, N, place(s, b, j), s.after + b * s.channels * N);
  });
}

// The backward pass takes few state numbers at a time, so that what it keeps of them stays in the nearest cache.
constexpr int FEW = 4;

// Of N state numbers in a chunk: h before each step and exp(d A), and sums for dB and dC over blocks of channels, not yet
// over all lanes: one vector for each piece of FEW.
struct Kept {
  float *h, *decay, *dB, *dC;
  static i64 piece(i64 i) { return (i + FEW - 1) / FEW; }  // of those that begin at i: 4 ... 4, 2, 1
  static i64 sums(i64 N) { return N / FEW + 2; }
  static i64 floats(i64 N) { return W * (FEW * (2 * T + 1) + 2 * T * sums(N)); }
  Kept(float* p, i64 N) : h(p), decay(h + (T + 1) * FEW * W), dB(decay + T * FEW * W), dC(dB + T * sums(N) * W) {}
};

template <int N>
inline void recompute(const Chunk& c, int n, const float* B, i64 b_time, const float* C, i64 c_time, const float* rate,
                      const float* before, float* h, float* decay, vf* y) {
  vf state[N], a[N];
  for (int i = 0; i < N; i++) state[i] = load(before + i * W), a[i] = load(rate + i * W), store(h + i * W, state[i]);
  for (int t = 0; t < n; t++) {
    const float *bt = B + t * b_time, *ct = C + t * c_time;
    vf sum = y[t];
    for (int i = 0; i < N; i++) {
      vf e = exp2(c.d[t] * a[i]);
      state[i] = state[i] * e + c.dx[t] * bt[i];
      store(decay + (t * N + i) * W, e);
      store(h + ((t + 1) * N + i) * W, state[i]);
      sum += state[i] * ct[i];
    }
    y[t] = sum;
  }
}

// Back through a chunk: dx_t = sum of g B (gradient of d u), dd_t = sum of the gradient of d A times A.
template <int N>
inline void back(const Chunk& c, int n, const vf* gy, const float* B, i64 b_time, const float* C, i64 c_time, const float* A,
                 const float* h, const float* decay, float* g, float* dA, float* dB, float* dC, i64 step, vf* dx, vf* dd) {
  vf grad[N], sum_A[N], a[N], now[N];
  for (int i = 0; i < N; i++) grad[i] = load(g + i * W), sum_A[i] = load(dA + i * W), a[i] = load(A + i * W);
  for (int i = 0; i < N; i++) now[i] = load(h + (n * N + i) * W);
  for (int t = n - 1; t >= 0; t--) {
    const float *bt = B + t * b_time, *ct = C + t * c_time;
    vf sum_x = dx[t], sum_d = dd[t], of_B[N], of_C[N];
    for (int i = 0; i < N; i++) {
      vf here = grad[i] + gy[t] * ct[i];
      of_C[i] = gy[t] * now[i];
      of_B[i] = here * c.dx[t];
      sum_x += here * bt[i];
      grad[i] = here * load(decay + (t * N + i) * W);
      now[i] = load(h + (t * N + i) * W);
      vf q = grad[i] * now[i];
      sum_d += q * a[i];
      sum_A[i] += q * c.d[t];
    }
    dx[t] = sum_x;
    dd[t] = sum_d;
    store(dB + t * step, load(dB + t * step) + sums<N>(of_B));
    store(dC + t * step, load(dC + t * step) + sums<N>(of_C));
  }
  for (int i = 0; i < N; i++) store(g + i * W, grad[i]), store(dA + i * W, sum_A[i]);
}

// Sums of a piece of n state numbers: lanes l with l % n = i belong to number i.
inline void spread(vf x, int n, float* to) {
  float lanes[W];
  store(lanes, x);
  for (int i = 0; i < n; i++) to[i] = 0;
  for (int l = 0; l < W; l++) to[l % n] += lanes[l];
}

void backward(const Scan& s, const ScanBack& r) {
  const i64 nb = blocks(s.channels), nc = chunks(s.time), N = s.states, all = s.batch * s.time * N;
  const i64 groups = nb < GROUPS ? nb : GROUPS;
  const i64 most = (nb + groups - 1) / groups;  // blocks of a group
  // One item is a group of blocks of one row: its blocks take turns within each chunk, so that dB and dC of the chunk are
  // gathered in the cache. Each block carries A, g, dA and A log2(e) from chunk to chunk.
  const i64 carried = 4 * N * W + 2 * W, step = Kept::sums(N) * W;
  parallel(s.batch * groups, 3 * all * s.channels, Kept::floats(N) + most * carried, [&](float* buffer, i64 item) {
    const i64 b = item / groups, group = item % groups;
    const i64 j0 = nb * group / groups, j1 = nb * (group + 1) / groups;
    float* carry = buffer + Kept::floats(N);
    Kept kept(buffer, N);
    const i64 end = real(s, b);
    for (i64 j = j0; j < j1; j++) {
      Place p = place(s, b, j);
      float* own = carry + (j - j0) * carried;
      gather(s.A, N, p, own);
      gather_rates(s.A, N, p, own + 3 * N * W + 2 * W);
      if (r.dafter) gather(r.dafter + b * s.channels * N, N, p, own + N * W);
      else std::memset(own + N * W, 0, 4 * N * W);
      std::memset(own + 2 * N * W, 0, 4 * (N * W + 2 * W));
    }
    for (i64 k = nc - 1; k >= 0; k--) {
      const i64 t0 = k * T;
      const int n = static_cast<int>(end - t0 < T ? (end > t0 ? end - t0 : 0) : T);
      std::memset(kept.dB, 0, 4 * 2 * T * step);
      const float *B = s.B + b * s.b_batch + t0 * s.b_time, *C = s.C + b * s.c_batch + t0 * s.c_time;
      for (i64 j = j0; j < j1; j++) {
        Place p = place(s, b, j);
        float *A = carry + (j - j0) * carried, *g = A + N * W, *dA = g + N * W, *sums = dA + N * W, *rate = sums + 2 * W;
        Chunk c;
        vf y[T], gy[T], dz[T], dx[T], dd[T];
        read(s, p, t0, n, -T, c);
        vf skip = s.D ? load(s.D + j * W, p.lanes) : vf{};
        const i64 d0 = j * W, out = (b * s.time + t0) * s.channels + d0;
        for (int t = 0; t < n; t++) {
          y[t] = skip * c.x[t], dx[t] = vf{}, dd[t] = vf{};
          const float* dy = r.dy + b * r.dy_batch + (t0 + t) * r.dy_time + d0;
          soon(dy - T * r.dy_time);
          gy[t] = load(dy, p.lanes);
          if (!s.z) continue;
          const float* gate = s.z + b * s.z_batch + (t0 + t) * s.z_time + d0;
          soon(gate - T * s.z_time);
          const vf z = load(gate, p.lanes), open = sigmoid(z);
          dz[t] = gy[t] * silu_slope(z, open);
          gy[t] = gy[t] * z * open;
        }
        const float* before = s.starts + ((b * nc + k) * nb + j) * N * W;
        pieces<FEW>(N, [&]<int M>(i64 i) {
          const i64 v = Kept::piece(i) * W;
          recompute<M>(c, n, B + i, s.b_time, C + i, s.c_time, rate + i * W, before + i * W, kept.h, kept.decay, y);
          back<M>(c, n, gy, B + i, s.b_time, C + i, s.c_time, A + i * W, kept.h, kept.decay, g + i * W, dA + i * W,
                  kept.dB + v, kept.dC + v, step, dx, dd);
        });
        for (int t = 0; s.z && t < n; t++) store(r.dz + out + t * s.channels, dz[t] * y[t], p.lanes);
        vf sum_D = load(sums), sum_bias = load(sums + W);
        for (int t = 0; t < n; t++) {
          store(r.du + out + t * s.channels, dx[t] * c.d[t] + gy[t] * skip, p.lanes);
          vf step = dx[t] * c.x[t] + dd[t];
          vf d = c.d[t];
          if (s.gaps) {
            const float gap = s.gaps[b * s.time + t0 + t];
            step = step * gap;
            if (s.softplus) {
              vf raw = load(s.dt + b * s.dt_batch + (t0 + t) * s.dt_time + d0, p.lanes);
              d = softplus(s.bias ? raw + load(s.bias + d0, p.lanes) : raw);
            }
          }
          if (s.softplus) step = step * softplus_slope(d);
          store(r.ddt + out + t * s.channels, step, p.lanes);
          sum_D += gy[t] * c.x[t];
          sum_bias += step;
        }
        for (i64 t = n; t < T && t0 + t < s.time; t++) {  // padding
          store(r.du + out + t * s.channels, vf{}, p.lanes);
          store(r.ddt + out + t * s.channels, vf{}, p.lanes);
          if (s.z) store(r.dz + out + t * s.channels, vf{}, p.lanes);
        }
        store(sums, sum_D);
        store(sums + W, sum_bias);
      }
      const i64 out = ((group * s.batch + b) * s.time + t0) * N;
      for (i64 t = 0; t < T && t0 + t < s.time; t++)
        pieces<FEW>(N, [&]<int M>(i64 i) {
          const i64 v = t * step + Kept::piece(i) * W;
          spread(load(kept.dB + v), M, r.dB + out + t * N + i);
          spread(load(kept.dC + v), M, r.dC + out + t * N + i);
        });
    }
    for (i64 j = j0; j < j1; j++) {
      Place p = place(s, b, j);
      float *A = carry + (j - j0) * carried, *g = A + N * W, *dA = g + N * W, *sums = dA + N * W;
      scatter(g, N, p, r.dbefore + b * s.channels * N);
      scatter(dA, N, p, r.dA + b * s.channels * N);
      store(r.dD + b * s.channels + j * W, load(sums), p.lanes);
      store(r.dbias + b * s.channels + j * W, load(sums + W), p.lanes);
    }
  });
}

}  // namespace scan
