// The delta rule and its general form, forward and backward.
//
//   delta     S_t = E_t S_{t-1} + k_t u_t^T               u_t = beta_t (v_t - z_t), z_t = S_{t-1}^T a_t, a_t = E_t k_t
//   general   S_t = E_t S_{t-1} + b_t z_t^T + k_t v_t^T   z_t = S_{t-1}^T a_t
//   both      o_t = S_t^T (scale q_t)                     E_t = diag(exp(g_t))
//
// The columns of S, one for each value channel, know nothing of each other. W of them are the lanes of a vector; a panel of
// up to four vectors goes through time in one piece, with one pass over its S a step: while S_t is made, o_t and z_{t+1}
// are gathered from it. Time goes in chunks: the forward pass saves S before each, the backward pass computes those within
// anew, keeps them in the second-level cache, and goes back in one pass a step as well. What has no value axis is a sum
// over panels: each has a part of its own.
#pragma once

#include "parallel.h"

extern "C" {
// Of a (batch, time, heads, ...) tensor, in numbers; what comes after the heads lies in one piece.
struct DeltaStrides {
  i64 batch, time, head;
};
// A null pointer: not given. a and b are given for the general form, beta for the other.
struct Delta {
  i64 batch, time, heads, keys, values;
  i64 gates;  // 0: none, 1: one a head and step, 2: one for each key channel as well (the general form has these)
  double scale;
  const float *q, *k, *v, *beta, *g, *a, *b;
  DeltaStrides at_q, at_k, at_v, at_beta, at_g, at_a, at_b;
  const float* before;  // (batch, heads, keys, values)
  float *o, *after;     // (batch, time, heads, values), as before
  float* starts;        // (batch, heads, chunks, keys, vectors * W): S before each chunk, or null
};
struct DeltaBack {
  const float *dout, *dafter;  // as o and after; dafter may be null
  DeltaStrides at_dout;
  float *dq, *dk, *da, *db;  // (panels, batch, time, heads, keys): parts to be summed
  float *dg, *dbeta;         // (panels, batch, time, heads), dg with keys where the gates have them: likewise
  float *dv, *dbefore;       // (batch, time, heads, values), (batch, heads, keys, values)
};
}

namespace delta {

enum Kind { PLAIN, HEAD, CHANNEL, GENERAL };  // the delta rule with the three kinds of gates; the general form

constexpr i64 WIDEST = 4;        // vectors of a panel
constexpr i64 LONGEST = 32;      // steps of a chunk
constexpr i64 CACHE = 1 << 17;   // floats of a chunk's S

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 vectors(i64 values) { return (values + W - 1) / W; }
inline i64 panels(i64 values) { return (vectors(values) + WIDEST - 1) / WIDEST; }
inline i64 widest(i64 values) { return (vectors(values) + panels(values) - 1) / panels(values); }
inline i64 steps(i64 keys, i64 values) {
  i64 n = LONGEST;
  while (n > 4 && n * keys * widest(values) * W > CACHE) n /= 2;
  return n;
}
inline i64 chunks(const Delta& d) {
  const i64 n = steps(d.keys, d.values);
  return (d.time + n - 1) / n;
}

inline const float* row(const float* p, const DeltaStrides& at, i64 b, i64 t, i64 h) {
  return p + b * at.batch + t * at.time + h * at.head;
}

// Of one head, the value channels of a panel.
struct Panel {
  i64 b, h, index, first;  // row, head, which panel, its first vector
  int count, tail;         // vectors, lanes of the last that are channels
  int lanes(int p) const { return p < count - 1 ? W : tail; }
};

inline Panel panel(const Delta& d, i64 item) {
  const i64 all = panels(d.values), index = item % all, head = item / all, nv = vectors(d.values);
  const i64 first = nv * index / all, last = nv * (index + 1) / all;
  return {head / d.heads, head % d.heads, index, first, static_cast<int>(last - first),
          static_cast<int>(least(d.values - (last - 1) * W, W))};
}

// S of a panel, (keys, P * W), from (keys, values) and back; lanes that are no channels are zero.
template <int P>
inline void gather(const float* from, const Delta& d, const Panel& u, float* to) {
  for (i64 i = 0; i < d.keys; i++)
    for (int p = 0; p < P; p++) store(to + (i * P + p) * W, load(from + i * d.values + (u.first + p) * W, u.lanes(p)));
}
template <int P>
inline void scatter(const float* from, const Delta& d, const Panel& u, float* to) {
  for (i64 i = 0; i < d.keys; i++)
    for (int p = 0; p < P; p++) store(to + i * d.values + (u.first + p) * W, load(from + (i * P + p) * W), u.lanes(p));
}

// What a chunk reads: rows of key channels, a whole number of vectors each, and of a panel's value channels.
struct Chunk {
  i64 width;                 // of a row of key channels
  float *q, *k, *e, *a, *b;  // scale * q, k, exp(g), and what reads z; a has a row of zeros after the last
  float *v, *beta;
  static i64 wide(i64 keys) { return (keys + W - 1) / W * W; }
  static i64 floats(i64 n, i64 keys, i64 vectors) { return (5 * n + 1) * wide(keys) + n * vectors * W + 2 * n; }
  Chunk(float* p, i64 n, i64 keys, i64 vectors) : width(wide(keys)) {
    q = p, k = q + n * width, e = k + n * width, b = e + n * width, a = b + n * width;
    v = a + (n + 1) * width, beta = v + n * vectors * W, gate = beta + n;
  }
  float* gate;  // exp(g) of a head
};

template <int P, Kind R>
inline void read(const Delta& d, const Panel& u, i64 t0, i64 n, Chunk& c) {
  const float scale = static_cast<float>(d.scale);
  for (i64 t = 0; t < n; t++) {
    const float *q = row(d.q, d.at_q, u.b, t0 + t, u.h), *k = row(d.k, d.at_k, u.b, t0 + t, u.h);
    const float* g = R == PLAIN ? nullptr : row(d.g, d.at_g, u.b, t0 + t, u.h);
    const vf gate = R == HEAD ? exp(all(*g)) : vf{};
    if constexpr (R == HEAD) c.gate[t] = gate[0];
    if constexpr (R != GENERAL) c.beta[t] = *row(d.beta, d.at_beta, u.b, t0 + t, u.h);
    for (i64 i = 0; i < d.keys; i += W) {
      const int lanes = static_cast<int>(least(d.keys - i, W));
      const i64 at = t * c.width + i;
      vf key = load(k + i, lanes);
      store(c.q + at, load(q + i, lanes) * scale);
      store(c.k + at, key);
      if constexpr (R == CHANNEL || R == GENERAL) store(c.e + at, exp(load(g + i, lanes)));
      if constexpr (R == PLAIN) store(c.a + at, key);
      if constexpr (R == HEAD) store(c.a + at, key * gate);
      if constexpr (R == CHANNEL) store(c.a + at, key * load(c.e + at));
      if constexpr (R == GENERAL) {
        store(c.a + at, load(row(d.a, d.at_a, u.b, t0 + t, u.h) + i, lanes));
        store(c.b + at, load(row(d.b, d.at_b, u.b, t0 + t, u.h) + i, lanes));
      }
    }
    const float* v = row(d.v, d.at_v, u.b, t0 + t, u.h) + u.first * W;
    for (int p = 0; p < P; p++) store(c.v + (t * P + p) * W, load(v + p * W, u.lanes(p)));
  }
  std::memset(c.a + n * c.width, 0, 4 * c.width);
}

// to = S^T x
template <int P>
inline void recall(i64 keys, const float* S, const float* x, vf* to) {
  vf sum[P] = {};
  for (i64 i = 0; i < keys; i++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) sum[p] += load(S + (i * P + p) * W) * x[i];
  for (int p = 0; p < P; p++) to[p] = sum[p];
}

// Step t of a chunk: S from one place to another (or the same), with y = u or v written; o_t and z_{t+1} on the way.
template <int P, Kind R, bool READ>
inline void advance(i64 keys, const Chunk& c, i64 t, const float* from, float* to, const vf* y, const vf* z, vf* o, vf* next) {
  const float *q = c.q + t * c.width, *k = c.k + t * c.width, *e = c.e + t * c.width, *b = c.b + t * c.width;
  const float* a = c.a + (t + 1) * c.width;
  const float gate = R == HEAD ? c.gate[t] : 1.0f;
  vf write[P], recalled[P], out[P], coming[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) write[p] = y[p], recalled[p] = z[p], out[p] = coming[p] = vf{};
  for (i64 i = 0; i < keys; i++) {
    const float qi = q[i], ki = k[i], bi = R == GENERAL ? b[i] : 0.0f, ai = a[i];
    const float ei = R == CHANNEL || R == GENERAL ? e[i] : gate;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      vf s = load(from + (i * P + p) * W);
      if constexpr (R != PLAIN) s = s * ei;
      s += write[p] * ki;
      if constexpr (R == GENERAL) s += recalled[p] * bi;
      store(to + (i * P + p) * W, s);
      if constexpr (READ) out[p] += s * qi;
      coming[p] += s * ai;
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) {
    if constexpr (READ) o[p] = out[p];
    next[p] = coming[p];
  }
}

template <int P, Kind R>
void forward(const Delta& d, const Panel& u, float* buffer) {
  const i64 size = steps(d.keys, d.values), nc = chunks(d), state = d.keys * P * W, whole = d.keys * vectors(d.values) * W;
  const i64 head = u.b * d.heads + u.h;
  float* S = buffer;
  Chunk c(buffer + state, least(size, d.time), d.keys, P);
  gather<P>(d.before + head * d.keys * d.values, d, u, S);
  for (i64 j = 0; j < nc; j++) {
    const i64 t0 = j * size, n = least(size, d.time - t0);
    if (d.starts) std::memcpy(d.starts + (head * nc + j) * whole + u.first * d.keys * W, S, 4 * state);
    read<P, R>(d, u, t0, n, c);
    vf z[P], y[P], o[P], next[P];
    recall<P>(d.keys, S, c.a, z);
    for (i64 t = 0; t < n; t++) {
      for (int p = 0; p < P; p++) {
        y[p] = load(c.v + (t * P + p) * W);
        if constexpr (R != GENERAL) y[p] = (y[p] - z[p]) * c.beta[t];
      }
      advance<P, R, true>(d.keys, c, t, S, S, y, z, o, next);
      float* to = d.o + ((u.b * d.time + t0 + t) * d.heads + u.h) * d.values + u.first * W;
      for (int p = 0; p < P; p++) store(to + p * W, o[p], u.lanes(p)), z[p] = next[p];
    }
  }
  scatter<P>(S, d, u, d.after + head * d.keys * d.values);
}

// Where the gradients of one step's key channels go.
struct Grads {
  float *q, *k, *g, *a, *b;
};
// What a step back is given, a vector for each of a panel's: y = u or v, z, and the gradients of o and z.
template <int P>
struct Given {
  vf y[P], z[P], out[P], dz[P];
};
// S^T k_{t-1} and S^T b_{t-1} of the gradient that has come to S_{t-1}.
template <int P>
struct Coming {
  vf y[P], z[P];
};

template <int P>
inline float dot(const vf* x, const vf* y) {
  vf s = {};
  for (int p = 0; p < P; p++) s += x[p] * y[p];
  return sum(s);
}
inline float dot(const float* x, const float* y, i64 n) {
  vf s = {};
  for (i64 i = 0; i < n; i += W) s += load(x + i) * load(y + i);
  return sum(s);
}

// Back through step t: G, the gradient of S_t without o_t's share, becomes that of S_{t-1}, which is given as S.
template <int P, Kind R>
inline void back(const Delta& d, const Chunk& c, i64 t, float* G, const float* S, const Given<P>& given, Coming<P>& coming,
                 const Grads& to) {
  const i64 at = t * c.width;
  const float *q = c.q + at, *k = c.k + at, *e = c.e + at, *a = c.a + at, *b = c.b + at;
  const i64 last = t ? at - c.width : at;  // before the first step, what comes is not used
  const float *k_last = c.k + last, *b_last = c.b + last;
  const float gate = R == HEAD ? c.gate[t] : 1.0f, scale = static_cast<float>(d.scale);
  const float written = dot<P>(given.y, given.out), recalled = R == GENERAL ? dot<P>(given.z, given.out) : 0.0f;
  vf y[P], z[P], out[P], dz[P], coming_y[P], coming_z[P], decayed = {};
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) {
    y[p] = given.y[p], z[p] = given.z[p], out[p] = given.out[p], dz[p] = given.dz[p];
    coming_y[p] = coming_z[p] = vf{};
  }
  for (i64 block = 0; block < d.keys; block += W) {
    const int lanes = static_cast<int>(least(d.keys - block, W));
    vf of_y[W], of_z[W], of_dz[W], of_out[W], of_S[W];
    for (int j = 0; j < lanes; j++) {
      const i64 i = block + j;
      const float qi = q[i], ki = k[i], ai = a[i], k_next = k_last[i], b_next = R == GENERAL ? b_last[i] : 0.0f;
      const float ei = R == CHANNEL || R == GENERAL ? e[i] : gate;
      vf by_y = {}, by_z = {}, by_dz = {}, by_out = {}, by_S = {};
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        vf s = load(S + (i * P + p) * W);
        vf here = load(G + (i * P + p) * W) + out[p] * qi;
        by_y += here * y[p];
        by_dz += s * dz[p];
        by_out += s * out[p];
        if constexpr (R == GENERAL) {
          by_z += here * z[p];
          by_S += here * s;
          here = here * ei + dz[p] * ai;
          coming_z[p] += here * b_next;
        } else {
          here += dz[p] * ki;
          if constexpr (R != PLAIN) by_S += here * s;
          if constexpr (R != PLAIN) here = here * ei;
        }
        store(G + (i * P + p) * W, here);
        coming_y[p] += here * k_next;
      }
      decayed += by_S;
      of_y[j] = by_y, of_z[j] = by_z, of_dz[j] = by_dz, of_out[j] = by_out, of_S[j] = by_S;
    }
    for (int j = lanes; j < W; j++) of_y[j] = of_z[j] = of_dz[j] = of_out[j] = of_S[j] = vf{};
    const vf decay = R == CHANNEL || R == GENERAL ? load(e + block) : all(gate);
    vf dq = decay * sums(of_out) + load(k + block) * written, dk = sums(of_y), read = sums(of_dz);
    if constexpr (R == GENERAL) {
      dq += load(b + block) * recalled;
      store(to.a + block, read, lanes);
      store(to.b + block, sums(of_z), lanes);
    } else {
      dk += decay * read;
    }
    store(to.q + block, dq * scale, lanes);
    store(to.k + block, dk, lanes);
    if constexpr (R == CHANNEL || R == GENERAL) store(to.g + block, decay * sums(of_S), lanes);
  }
  if constexpr (R == HEAD) *to.g = gate * sum(decayed);
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) coming.y[p] = coming_y[p], coming.z[p] = coming_z[p];
}

// Floats for S before each step of a chunk and after the last, and for y and z of each step.
inline i64 kept(i64 n, i64 keys, i64 vectors) { return (n + 1) * keys * vectors * W + 2 * n * vectors * W; }

template <int P, Kind R>
void backward(const Delta& d, const DeltaBack& r, const Panel& u, float* buffer) {
  const i64 size = steps(d.keys, d.values), nc = chunks(d), state = d.keys * P * W, whole = d.keys * vectors(d.values) * W;
  const i64 head = u.b * d.heads + u.h, most = least(size, d.time);
  float *G = buffer, *S = G + state, *ys = S + (most + 1) * state, *zs = ys + most * P * W;
  Chunk c(zs + most * P * W, most, d.keys, P);
  if (r.dafter) gather<P>(r.dafter + head * d.keys * d.values, d, u, G);
  else std::memset(G, 0, 4 * state);
  for (i64 j = nc - 1; j >= 0; j--) {
    const i64 t0 = j * size, n = least(size, d.time - t0);
    read<P, R>(d, u, t0, n, c);
    std::memcpy(S, d.starts + (head * nc + j) * whole + u.first * d.keys * W, 4 * state);
    vf z[P], y[P], next[P];
    recall<P>(d.keys, S, c.a, z);
    for (i64 t = 0; t < n; t++) {
      for (int p = 0; p < P; p++) {
        y[p] = load(c.v + (t * P + p) * W);
        if constexpr (R != GENERAL) y[p] = (y[p] - z[p]) * c.beta[t];
        store(ys + (t * P + p) * W, y[p]);
        store(zs + (t * P + p) * W, z[p]);
      }
      advance<P, R, false>(d.keys, c, t, S + t * state, S + (t + 1) * state, y, z, nullptr, next);
      for (int p = 0; p < P; p++) z[p] = next[p];
    }
    Coming<P> coming = {};
    recall<P>(d.keys, G, c.k + (n - 1) * c.width, coming.y);
    if constexpr (R == GENERAL) recall<P>(d.keys, G, c.b + (n - 1) * c.width, coming.z);
    for (i64 t = n - 1; t >= 0; t--) {
      const i64 step = (u.b * d.time + t0 + t) * d.heads + u.h;
      const i64 part = u.index * d.batch * d.time * d.heads + step;  // the same of this panel's part
      const float* dout = row(r.dout, r.at_dout, u.b, t0 + t, u.h) + u.first * W;
      const float* q = c.q + t * c.width;
      const float by_y = dot(q, c.k + t * c.width, c.width), by_z = R == GENERAL ? dot(q, c.b + t * c.width, c.width) : 0.0f;
      Given<P> given;
      vf off[P], dy[P];
      for (int p = 0; p < P; p++) {
        given.y[p] = load(ys + (t * P + p) * W), given.z[p] = load(zs + (t * P + p) * W);
        given.out[p] = load(dout + p * W, u.lanes(p));
        dy[p] = coming.y[p] + given.out[p] * by_y;
        off[p] = load(c.v + (t * P + p) * W) - given.z[p];
        vf dv = dy[p];
        if constexpr (R == GENERAL) given.dz[p] = coming.z[p] + given.out[p] * by_z;
        else dv = dv * c.beta[t], given.dz[p] = -dv;
        store(r.dv + step * d.values + (u.first + p) * W, dv, u.lanes(p));
      }
      if constexpr (R != GENERAL) r.dbeta[part] = dot<P>(dy, off);
      Grads to = {};
      to.q = r.dq + part * d.keys, to.k = r.dk + part * d.keys;
      if constexpr (R == HEAD) to.g = r.dg + part;
      if constexpr (R == CHANNEL || R == GENERAL) to.g = r.dg + part * d.keys;
      if constexpr (R == GENERAL) to.a = r.da + part * d.keys, to.b = r.db + part * d.keys;
      back<P, R>(d, c, t, G, S + t * state, given, coming, to);
    }
  }
  scatter<P>(G, d, u, r.dbefore + head * d.keys * d.values);
}

// work.operator()<P, R>() for a panel of P vectors and the kind R.
template <int P, class Work>
inline void of_kind(const Delta& d, Work work) {
  if (d.a) work.template operator()<P, GENERAL>();
  else if (d.gates == 2) work.template operator()<P, CHANNEL>();
  else if (d.gates == 1) work.template operator()<P, HEAD>();
  else work.template operator()<P, PLAIN>();
}
template <class Work>
inline void of_width(const Delta& d, int vectors, Work work) {
  if (vectors == 4) of_kind<4>(d, work);
  else if (vectors == 3) of_kind<3>(d, work);
  else if (vectors == 2) of_kind<2>(d, work);
  else of_kind<1>(d, work);
}

void forward(const Delta& d) {
  const i64 most = least(steps(d.keys, d.values), d.time), wide = widest(d.values);
  const i64 floats = d.keys * wide * W + Chunk::floats(most, d.keys, wide);
  const i64 items = d.batch * d.heads * panels(d.values);
  parallel(items, 4 * d.batch * d.time * d.heads * d.keys * d.values, floats, [&](float* buffer, i64 item) {
    Panel u = panel(d, item);
    of_width(d, u.count, [&]<int P, Kind R>() { forward<P, R>(d, u, buffer); });
  });
}

void backward(const Delta& d, const DeltaBack& r) {
  const i64 most = least(steps(d.keys, d.values), d.time), wide = widest(d.values);
  const i64 floats = d.keys * wide * W + kept(most, d.keys, wide) + Chunk::floats(most, d.keys, wide);
  const i64 items = d.batch * d.heads * panels(d.values);
  parallel(items, 12 * d.batch * d.time * d.heads * d.keys * d.values, floats, [&](float* buffer, i64 item) {
    Panel u = panel(d, item);
    of_width(d, u.count, [&]<int P, Kind R>() { backward<P, R>(d, r, u, buffer); });
  });
}

}  // namespace delta
