// Linear attention with decays, forward, backward and a single step.
//
//   S_t = diag(d_t) S_{t-1} + k_t v_t^T;   o_t = S_t^T q_t,  or with a bonus u  o_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t
//
// The recurrence as it stands: a tile of the memory, some keys by some vectors of values, stays in registers while a chunk
// of time runs past it. That costs three operations for each number of the memory and step; a chunked form by matrix
// products costs two and what happens within the chunk, and has to keep its decays from under- and overflowing.
// The forward pass saves the memory before each chunk. The backward pass runs a tile through the chunk once more, keeps
// what has faded at each step, and comes back with the gradient of the memory in registers.
#pragma once

#include "parallel.h"

extern "C" {
// Sizes and strides in numbers; the last dimension lies in one piece. A null pointer: not given.
struct LinearAttention {
  i64 batch, time, heads, groups, keys, values;
  i64 decay;  // 0: none, 1: one for each head, 2: one for each key channel; their logarithms are g
  i64 ones;   // 1: the memory has one more column, of a value that is always 1, and its reading (plus eps) divides
  const float *q, *k, *v, *g, *bonus;  // (batch, time, groups, keys) twice, (batch, time, heads, values), g; (heads, keys)
  i64 q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head, g_batch, g_time, g_head;
  const float* before;                 // (batch, heads, keys, values + ones)
  float *o, *after;                    // (batch, time, heads, values); as before
  float *starts, *norms;               // the memory before each chunk, or null; (batch, time, heads): what divides o
  float scale, eps;                    // of q; of the norms
};
struct LinearAttentionBack {
  const float *dy, *o, *dafter;  // gradient of o; o itself, where norms divide it; gradient of the memory after
  i64 dy_batch, dy_time, dy_head;
  float *dq, *dk;                // (parts, batch, time, groups, keys), to be summed
  float *dv, *dg;                // (batch, time, heads, values), (batch, time, heads[, keys])
  float *dbonus, *dbefore;       // (batch, heads, keys), to be summed; as before
};
}

namespace linear {

constexpr int T = 64;  // steps of a chunk
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDE = 4;  // vectors of a tile: with ROWS keys, what 32 registers hold
#else
constexpr int WIDE = 2;  // 16 registers
#endif
constexpr int ROWS = 4;  // keys of a tile
constexpr i64 PARTS = 8;  // of the gradients that heads share, about: fixed, so that sums do not depend on threads

enum Decay { NONE, HEAD, CHANNEL };

inline i64 padded(i64 n, i64 unit) { return (n + unit - 1) / unit * unit; }
inline i64 chunks(i64 time) { return (time + T - 1) / T; }
inline i64 rows(const LinearAttention& s) { return padded(s.keys, ROWS); }
inline i64 width(const LinearAttention& s) { return padded(s.values + s.ones, W); }
inline i64 parts(i64 heads, i64 groups) {
  const i64 most = groups < PARTS ? PARTS / groups : 1, shared = heads / groups;
  return shared < most ? shared : most;
}

// Calls with a block of columns at a time: its first, and how many vectors it has, as a type.
template <class Block>
inline void columns(i64 width, Block block) {
  i64 j = 0;
  for (; j + WIDE * W <= width; j += WIDE * W) block.template operator()<WIDE>(j);
  if (WIDE > 2 && j + 2 * W <= width) block.template operator()<2>(j), j += 2 * W;
  if (j < width) block.template operator()<1>(j);
}

// n rows of `count` numbers, side by side, with zeros up to `size`.
inline void pack(const float* from, i64 stride, int n, i64 count, i64 size, float* to) {
  const i64 whole = count / W * W;
  for (int t = 0; t < n; t++, from += stride, to += size) {
    for (i64 i = 0; i < whole; i += W) store(to + i, load(from + i));
    for (i64 i = whole; i < size; i++) to[i] = i < count ? from[i] : 0.0f;
  }
}
inline void unpack(const float* from, i64 size, i64 n, i64 count, float* to, i64 stride) {
  const i64 whole = count / W * W;
  for (i64 t = 0; t < n; t++, from += size, to += stride) {
    for (i64 i = 0; i < whole; i += W) store(to + i, load(from + i));
    for (i64 i = whole; i < count; i++) to[i] = from[i];
  }
}

// exp(g), for a step whose neighbours have much the same g: near 1, what a rounded decay lacks would grow with the length
// of the memory, so it is added to the next one. Then all products of neighbouring decays are exact to a few last places.
inline vf fade(vf g, vf& missing) {
  vf change = less_one(g) + missing, d = change + 1.0f;
  auto near = g * g < all(0.1f);
  missing = near ? change - (d - 1.0f) : missing;
  return near ? d : exp(g);
}

// What a head reads in a chunk of n steps.
struct Chunk {
  float *q, *k, *d, *v;  // q, k: (T, rows), d: (T, rows) or (T); v: (T, width)
  float* late;           // (rows) or one: what the last decay lacks
  i64 rows, width;
  int n;
  static i64 floats(const LinearAttention& s) {
    return T * (3 * linear::rows(s) + linear::width(s)) + padded(linear::rows(s), W);
  }
  Chunk(const LinearAttention& s, float* buffer) : rows(linear::rows(s)), width(linear::width(s)), n(0) {
    q = buffer, k = q + T * rows, d = k + T * rows, v = d + T * rows, late = v + T * width;
    for (i64 i = 0; i < rows; i++) late[i] = 0;
  }
  void read(const LinearAttention& s, i64 b, i64 h, i64 t0) {
    const i64 group = h / (s.heads / s.groups);
    n = static_cast<int>(s.time - t0 < T ? s.time - t0 : T);
    pack(s.q + b * s.q_batch + group * s.q_head + t0 * s.q_time, s.q_time, n, s.keys, rows, q);
    for (i64 i = 0; i < n * rows; i++) q[i] *= s.scale;
    pack(s.k + b * s.k_batch + group * s.k_head + t0 * s.k_time, s.k_time, n, s.keys, rows, k);
    pack(s.v + b * s.v_batch + h * s.v_head + t0 * s.v_time, s.v_time, n, s.values, width, v);
    if (s.ones)
      for (int t = 0; t < n; t++) v[t * width + s.values] = 1;
    if (s.decay == NONE) return;
    const i64 count = s.decay == HEAD ? 1 : s.keys, size = s.decay == HEAD ? 1 : rows;
    pack(s.g + b * s.g_batch + h * s.g_head + t0 * s.g_time, s.g_time, n, count, size, d);
    for (i64 i = 0; i < size; i += W) {
      const int lanes = static_cast<int>(size - i < W ? size - i : W);
      vf missing = load(late + i, lanes);
      for (int t = 0; t < n; t++) store(d + t * size + i, fade(load(d + t * size + i, lanes), missing), lanes);
      store(late + i, missing, lanes);
    }
  }
};

// The sum of a b, or a b c.
inline float dot(i64 n, const float* a, const float* b, const float* c = nullptr) {
  vf total = {};
  for (i64 i = 0; i < n; i += W) {
    const int lanes = static_cast<int>(n - i < W ? n - i : W);
    const vf product = load(a + i, lanes) * load(b + i, lanes);
    total += c ? product * load(c + i, lanes) : product;
  }
  return sum(total);
}

// A tile of R keys and C vectors through a chunk: the memory S changes, o gathers what is read.
template <int C, int DECAY, bool BONUS>
inline void run(const Chunk& x, i64 i, i64 j, float* S, float* o) {
  constexpr int R = ROWS;
  vf s[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) s[r][c] = load(S + r * x.width + c * W);
  const i64 rows = x.rows, width = x.width;
  const float *q = x.q + i, *k = x.k + i, *d = DECAY == HEAD ? x.d : x.d + i, *value = x.v + j;
  o += j;
  for (int t = x.n; t; t--, q += rows, k += rows, d += DECAY == HEAD ? 1 : rows, value += width, o += width) {
    vf v[C], y[C];
    for (int c = 0; c < C; c++) v[c] = load(value + c * W), y[c] = load(o + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        if (BONUS) y[c] += s[r][c] * q[r];
        s[r][c] = DECAY == NONE ? s[r][c] + v[c] * k[r] : s[r][c] * d[DECAY == HEAD ? 0 : r] + v[c] * k[r];
        if (!BONUS) y[c] += s[r][c] * q[r];
      }
    for (int c = 0; c < C; c++) store(o + c * W, y[c]);
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(S + r * width + c * W, s[r][c]);
}

// One function of the kinds of decay and bonus, as types, from those of a call.
template <class Body>
inline void kinds(const LinearAttention& s, Body body) {
  if (s.bonus) {
    if (s.decay == NONE) body.template operator()<NONE, true>();
    else if (s.decay == HEAD) body.template operator()<HEAD, true>();
    else body.template operator()<CHANNEL, true>();
  } else {
    if (s.decay == NONE) body.template operator()<NONE, false>();
    else if (s.decay == HEAD) body.template operator()<HEAD, false>();
    else body.template operator()<CHANNEL, false>();
  }
}

// C vectors of a memory's columns through a single step, in one pass over it.
template <int C, int DECAY, bool BONUS>
inline void once(const Chunk& x, i64 keys, i64 columns, i64 j, const float* from, float* to, float* o) {
  vf v[C], y[C];
  for (int c = 0; c < C; c++) v[c] = load(x.v + j + c * W), y[c] = load(o + j + c * W);
  for (i64 i = 0; i < keys; i++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      vf s = from ? load(from + i * columns + j + c * W) : vf{};
      if (BONUS) y[c] += s * x.q[i];
      s = DECAY == NONE ? s + v[c] * x.k[i] : s * x.d[DECAY == HEAD ? 0 : i] + v[c] * x.k[i];
      if (!BONUS) y[c] += s * x.q[i];
      store(to + i * columns + j + c * W, s);
    }
  for (int c = 0; c < C; c++) store(o + j + c * W, y[c]);
}
template <int DECAY, bool BONUS>
inline void once_by_number(const Chunk& x, i64 keys, i64 columns, i64 j, const float* from, float* to, float* o) {
  for (i64 i = 0; i < keys; i++)
    for (i64 c = j; c < columns; c++) {
      float s = from ? from[i * columns + c] : 0.0f;
      if (BONUS) o[c] += s * x.q[i];
      s = DECAY == NONE ? s + x.v[c] * x.k[i] : s * x.d[DECAY == HEAD ? 0 : i] + x.v[c] * x.k[i];
      if (!BONUS) o[c] += s * x.q[i];
      to[i * columns + c] = s;
    }
}

template <int DECAY, bool BONUS>
inline void step(const Chunk& x, i64 keys, i64 columns, const float* from, float* to, float* o) {
  const i64 whole = columns / W * W;
  linear::columns(whole, [&]<int C>(i64 j) { once<C, DECAY, BONUS>(x, keys, columns, j, from, to, o); });
  once_by_number<DECAY, BONUS>(x, keys, columns, whole, from, to, o);
}

void forward(const LinearAttention& s) {
  const i64 R = rows(s), V = width(s), nc = chunks(s.time), columns = s.values + s.ones, size = s.keys * columns;
  const bool single = s.time == 1 && !s.starts;
  const i64 work = s.batch * s.time * s.heads * size, floats = Chunk::floats(s) + T * V + R * V;
  parallel(s.batch * s.heads, work, floats, [&](float* buffer, i64 item) {
    const i64 b = item / s.heads, h = item % s.heads;
    Chunk x(s, buffer);
    float *o = buffer + Chunk::floats(s), *S = o + T * V;
    const float* before = s.before ? s.before + item * size : nullptr;
    float* after = s.after + item * size;
    if (!single) {
      std::memset(S, 0, 4 * R * V);
      if (before) pack(before, columns, static_cast<int>(s.keys), columns, V, S);
    }
    for (i64 c = 0; c < nc; c++) {
      if (s.starts) std::memcpy(s.starts + (item * nc + c) * R * V, S, 4 * R * V);
      x.read(s, b, h, c * T);
      for (int t = 0; t < x.n; t++) {
        const float share = s.bonus ? dot(s.keys, x.q + t * R, x.k + t * R, s.bonus + h * s.keys) : 0.0f;
        for (i64 j = 0; j < V; j++) o[t * V + j] = s.bonus ? share * x.v[t * V + j] : 0.0f;
      }
      kinds(s, [&]<int DECAY, bool BONUS>() {
        if (single) return step<DECAY, BONUS>(x, s.keys, columns, before, after, o);
        linear::columns(V, [&]<int C>(i64 j) {
          for (i64 i = 0; i < R; i += ROWS) run<C, DECAY, BONUS>(x, i, j, S + i * V + j, o);
        });
      });
      const i64 first = (b * s.time + c * T) * s.heads + h;
      for (int t = 0; t < x.n; t++) {
        if (!s.ones) continue;
        const float norm = o[t * V + s.values] + s.eps;
        s.norms[first + t * s.heads] = norm;
        for (i64 j = 0; j < V; j++) o[t * V + j] /= norm;
      }
      unpack(o, V, x.n, s.values, s.o + first * s.values, s.heads * s.values);
    }
    if (!single) unpack(S, V, s.keys, columns, after, columns);
  });
}

// What going back through a chunk needs beside what it reads.
struct Back {
  float *dy, *dv;        // (T, width): gradients of what is read, and of v
  float *dq, *dk, *dg;   // (T, rows)
  float *faded;          // (T, ROWS, C, W): d_t S_{t-1} of a tile
  float *q, *k, *g, *d;  // (T, ROWS, W): sums over values to be, one vector for each key and step; d: (T, W), over keys too
  static i64 floats(const LinearAttention& s) {
    return T * (2 * linear::width(s) + 3 * linear::rows(s) + ROWS * W * (WIDE + 3) + W);
  }
  Back(const LinearAttention& s, float* buffer) {
    const i64 R = linear::rows(s), V = linear::width(s);
    dy = buffer, dv = dy + T * V, dq = dv + T * V, dk = dq + T * R, dg = dk + T * R, faded = dg + T * R;
    q = faded + T * ROWS * WIDE * W, k = q + T * ROWS * W, g = k + T * ROWS * W, d = g + T * ROWS * W;
  }
};

// A tile through the chunk once more: keeps what has faded, and sums S dy for the gradient of q.
template <int C, int DECAY, bool BONUS>
inline void again(const Chunk& x, const Back& r, i64 i, i64 j, const float* S) {
  constexpr int R = ROWS;
  vf s[R][C];
  for (int a = 0; a < R; a++)
    for (int c = 0; c < C; c++) s[a][c] = load(S + a * x.width + c * W);
  const i64 rows = x.rows, width = x.width;
  const float *k = x.k + i, *d = DECAY == HEAD ? x.d : x.d + i, *value = x.v + j, *dy = r.dy + j;
  float *faded = r.faded, *sums = r.q;
  for (int t = x.n; t; t--, k += rows, d += DECAY == HEAD ? 1 : rows, value += width, dy += width) {
    vf v[C], y[C];
    for (int c = 0; c < C; c++) v[c] = load(value + c * W), y[c] = load(dy + c * W);
#pragma GCC unroll 8
    for (int a = 0; a < R; a++, sums += W) {
      vf read = j ? load(sums) : vf{};
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        if (BONUS) read += s[a][c] * y[c];
        if (DECAY != NONE) {
          s[a][c] = s[a][c] * d[DECAY == HEAD ? 0 : a];
          store(faded + (a * C + c) * W, s[a][c]);
        }
        s[a][c] += v[c] * k[a];
        if (!BONUS) read += s[a][c] * y[c];
      }
      store(sums, read);
    }
    faded += R * C * W;
  }
}

// And back: G is the gradient of the memory, first that after the chunk, then that before it.
template <int C, int DECAY, bool BONUS>
inline void back(const Chunk& x, const Back& r, i64 i, i64 j, float* G) {
  constexpr int R = ROWS;
  vf g[R][C];
  for (int a = 0; a < R; a++)
    for (int c = 0; c < C; c++) g[a][c] = load(G + a * x.width + c * W);
  const i64 rows = x.rows, width = x.width;
  for (i64 t = x.n - 1; t >= 0; t--) {
    const float *q = x.q + t * rows + i, *k = x.k + t * rows + i, *d = x.d + (DECAY == HEAD ? t : t * rows + i);
    const float *value = x.v + t * width + j, *dy = r.dy + t * width + j, *faded = r.faded + t * R * C * W;
    float *to_v = r.dv + t * width + j, *to_k = r.k + t * R * W, *to_g = r.g + t * R * W;
    vf v[C], y[C], dv[C], total = {};
    for (int c = 0; c < C; c++) v[c] = load(value + c * W), y[c] = load(dy + c * W), dv[c] = load(to_v + c * W);
#pragma GCC unroll 8
    for (int a = 0; a < R; a++) {
      vf written = j ? load(to_k + a * W) : vf{}, kept = j && DECAY == CHANNEL ? load(to_g + a * W) : vf{};
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        if (!BONUS) g[a][c] += y[c] * q[a];
        dv[c] += g[a][c] * k[a];
        written += g[a][c] * v[c];
        if (DECAY != NONE) {
          kept += g[a][c] * load(faded + (a * C + c) * W);
          g[a][c] = g[a][c] * d[DECAY == HEAD ? 0 : a];
        }
        if (BONUS) g[a][c] += y[c] * q[a];
      }
      store(to_k + a * W, written);
      if (DECAY == CHANNEL) store(to_g + a * W, kept);
      if (DECAY == HEAD) total += kept;
    }
    for (int c = 0; c < C; c++) store(to_v + c * W, dv[c]);
    if (DECAY == HEAD) store(r.d + t * W, load(r.d + t * W) + total);
  }
  for (int a = 0; a < R; a++)
    for (int c = 0; c < C; c++) store(G + a * x.width + c * W, g[a][c]);
}

// (n, ROWS, W) summed over lanes into columns i ... i + ROWS of (n, size).
inline void gather(const float* from, int n, i64 i, float* to, i64 size) {
  float found[T * ROWS];
  static_assert(T * ROWS % W == 0);
  for (int a = 0; a < n * ROWS; a += W) {
    vf x[W];
    for (int k = 0; k < W; k++) x[k] = load(from + (a + k) * W);
    store(found + a, sums(x));
  }
  for (int t = 0; t < n; t++) std::memcpy(to + t * size + i, found + t * ROWS, 4 * ROWS);
}

// Gradients of the outputs of a chunk, through the norms.
inline void read_back(const LinearAttention& s, const LinearAttentionBack& r, i64 b, i64 h, i64 t0, int n, float* dy) {
  const i64 V = width(s);
  pack(r.dy + b * r.dy_batch + h * r.dy_head + t0 * r.dy_time, r.dy_time, n, s.values, V, dy);
  if (!s.ones) return;
  for (int t = 0; t < n; t++, dy += V) {
    const i64 at = (b * s.time + t0 + t) * s.heads + h;
    for (i64 j = 0; j < s.values; j++) dy[j] /= s.norms[at];
    dy[s.values] = -dot(s.values, dy, r.o + at * s.values);
  }
}

inline void add(const float* from, i64 count, bool first, float factor, float* to) {
  for (i64 i = 0; i < count; i++) to[i] = from[i] * factor + (first ? 0.0f : to[i]);
}

// Back through all the chunks of one head. first: of the heads whose gradients of q and k are summed at dq and dk.
inline void back_head(const LinearAttention& s, const LinearAttentionBack& r, i64 b, i64 h, float* dq, float* dk, bool first,
                      float* buffer) {
  const i64 R = rows(s), V = width(s), nc = chunks(s.time), columns = s.values + s.ones, item = b * s.heads + h;
  Chunk x(s, buffer);
  Back w(s, buffer + Chunk::floats(s));
  float *G = buffer + Chunk::floats(s) + Back::floats(s), *dbonus = r.dbonus + item * s.keys;
  const float* u = s.bonus ? s.bonus + h * s.keys : nullptr;
  std::memset(G, 0, 4 * R * V);
  if (r.dafter) pack(r.dafter + item * s.keys * columns, columns, static_cast<int>(s.keys), columns, V, G);
  for (i64 i = 0; u && i < s.keys; i++) dbonus[i] = 0;
  for (i64 c = nc - 1; c >= 0; c--) {
    const i64 t0 = c * T, at = (b * s.time + t0) * s.heads + h;
    const float* S = s.starts + (item * nc + c) * R * V;
    x.read(s, b, h, t0);
    read_back(s, r, b, h, t0, x.n, w.dy);
    for (int t = 0; t < x.n; t++) {
      const float share = u ? dot(s.keys, x.q + t * R, x.k + t * R, u) : 0.0f;
      for (i64 j = 0; j < V; j++) w.dv[t * V + j] = u ? share * w.dy[t * V + j] : 0.0f;
    }
    std::memset(w.d, 0, 4 * T * W);
    kinds(s, [&]<int DECAY, bool BONUS>() {
      for (i64 i = 0; i < R; i += ROWS) {
        linear::columns(V, [&]<int C>(i64 j) {
          again<C, DECAY, BONUS>(x, w, i, j, S + i * V + j);
          back<C, DECAY, BONUS>(x, w, i, j, G + i * V + j);
        });
        gather(w.q, x.n, i, w.dq, R);
        gather(w.k, x.n, i, w.dk, R);
        if (DECAY == CHANNEL) gather(w.g, x.n, i, w.dg, R);
      }
    });
    for (int t = 0; t < x.n; t++) {
      float *to_q = w.dq + t * R, *to_k = w.dk + t * R, *q = x.q + t * R, *k = x.k + t * R;
      if (u) {
        const float share = dot(V, w.dy + t * V, x.v + t * V);
        for (i64 i = 0; i < s.keys; i++) {
          to_q[i] += share * u[i] * k[i];
          to_k[i] += share * u[i] * q[i];
          dbonus[i] += share * q[i] * k[i];
        }
      }
      const i64 place = (t0 + t) * s.groups * s.keys, there = at + t * s.heads;
      add(to_q, s.keys, first, s.scale, dq + place);
      add(to_k, s.keys, first, 1.0f, dk + place);
      if (s.decay == CHANNEL) std::memcpy(r.dg + there * s.keys, w.dg + t * R, 4 * s.keys);
      if (s.decay == HEAD) r.dg[there] = sum(load(w.d + t * W));
    }
    unpack(w.dv, V, x.n, s.values, r.dv + at * s.values, s.heads * s.values);
  }
  unpack(G, V, s.keys, columns, r.dbefore + item * s.keys * columns, columns);
}

void backward(const LinearAttention& s, const LinearAttentionBack& r) {
  const i64 shared = s.heads / s.groups, np = parts(s.heads, s.groups), size = s.time * s.groups * s.keys;
  const i64 work = 3 * s.batch * s.time * s.heads * s.keys * s.values;
  const i64 floats = Chunk::floats(s) + Back::floats(s) + rows(s) * width(s);
  parallel(s.batch * s.groups * np, work, floats, [&](float* buffer, i64 item) {
    const i64 b = item / (s.groups * np), group = item / np % s.groups, part = item % np;
    const i64 first = shared * part / np, end = shared * (part + 1) / np, to = (part * s.batch + b) * size + group * s.keys;
    for (i64 h = first; h < end; h++) back_head(s, r, b, group * shared + h, r.dq + to, r.dk + to, h == first, buffer);
  });
}

}  // namespace linear
