// A program: one step of a model for a few rows, as instructions over strided tensors, run in one parallel region.
//
// src/bestiary/decoding makes programs from the models' own steps. Large instructions (products, memories) are shared by
// the threads, small ones are done by the first; a thread waits only where it reads what another wrote. Every item is
// computed by one thread in the same way, so the result does not depend on how many there are.
#pragma once

#include <initializer_list>

#include "matvec.h"
#include "wkv.h"

extern "C" {
// `at` numbers into region number `region`, or an address where that is below 0. Strides in numbers.
struct Operand {
  i64 region, at, stride[4];
};

struct Instruction {
  i64 op, shared, wait;  // see the enumerations below; `wait`: for all threads to have come this far
  i64 shape[4];
  i64 number[6];
  double real[2];
  const Matrix* matrix;
  i64 operands;  // the first of its operands in the program's list: results, then inputs
};

struct Program {
  i64 rows, instructions, scratch, threads;  // scratch: numbers for each thread; threads: at most
  const Instruction* list;
  const Operand* operands;
};
}

namespace program {

enum Op { UNARY, BINARY, LERP, REDUCE, LAYER_NORM, PRODUCT, BATCHED, CONVOLUTION, SCAN, LINEAR, DELTA, WKV, ATTEND,
          ADVANCE, ROTATE, GATHER, FENWICK };
enum Unary { COPY, NEG, EXP, SIGMOID, SILU, TANH, RELU, SOFTPLUS, LOG_SIGMOID, GELU, GELU_TANH, ELU, SQRT, RSQRT, RECIPROCAL,
             ABS, LOG, EXPM1, SIN, COS, AFFINE, SQUARE, CLAMP };
enum Binary { ADD, SUB, MUL, DIV, MAX, MIN, TURN };
enum Reduction { SUM, MEAN, LARGEST, LENGTH };

struct View {
  float* data;
  i64 stride[4];
  float* at(i64 a, i64 b = 0, i64 c = 0, i64 d = 0) const {
    return data + a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3];
  }
};

struct Run {
  const Program& program;
  void* const* regions;
  float* scratch;  // this thread's
  i64 thread, threads;

  const Operand& operand(const Instruction& i, i64 n) const { return program.operands[i.operands + n]; }
  View view(const Instruction& i, i64 n) const {
    const Operand& o = operand(i, n);
    View v;
    v.data = o.region < 0 ? reinterpret_cast<float*>(o.at) : static_cast<float*>(regions[o.region]) + o.at;
    for (int k = 0; k < 4; k++) v.stride[k] = o.stride[k];
    return v;
  }
  // This thread's share of `count` items.
  i64 from(i64 count) const { return count * thread / threads; }
  i64 to(i64 count) const { return count * (thread + 1) / threads; }
};

template <class F>
inline vf each(vf x, F f) {
  float s[W];
  store(s, x);
  for (int i = 0; i < W; i++) s[i] = f(s[i]);
  return load(s);
}

inline vf root(vf x) { return each(x, [](float v) { return std::sqrt(v); }); }

// tanh, by its series where 1 - exp(-2|x|) would cancel.
inline vf tanh(vf x) {
  vf size = x < vf{} ? -x : x, u = exp(-2.0f * size), q = x * x;
  vf far = (1.0f - u) / (1.0f + u);
  vf p = all(-0.0088632355f);
  p = p * q + 0.0218694885f;
  p = p * q - 0.0539682540f;
  p = p * q + 0.1333333333f;
  p = p * q - 0.3333333333f;
  vf near = p * q * size + size;
  vf y = size < all(0.25f) ? near : far;
  return x < vf{} ? -y : y;
}

inline vf unary(i64 which, vf x, float a, float b) {
  switch (which) {
    case NEG: return -x;
    case EXP: return exp(x);
    case SIGMOID: return sigmoid(x);
    case SILU: return silu(x);
    case TANH: return tanh(x);
    case RELU: return x < vf{} ? vf{} : x;
    case SOFTPLUS: return softplus(x);
    case LOG_SIGMOID: return -softplus(-x);
    case GELU: return each(x, [](float v) { return 0.5f * v * std::erfc(-0.70710678f * v); });
    case GELU_TANH: return 0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    case ELU: return x > vf{} ? x : each(x, [](float v) { return std::expm1(v); });
    case SQRT: return root(x);
    case RSQRT: return 1.0f / root(x);
    case RECIPROCAL: return 1.0f / x;
    case ABS: return x < vf{} ? -x : x;
    case LOG: return each(x, [](float v) { return std::log(v); });
    case EXPM1: return each(x, [](float v) { return std::expm1(v); });
    case SIN: return each(x, [](float v) { return std::sin(v); });
    case COS: return each(x, [](float v) { return std::cos(v); });
    case AFFINE: return x * a + b;
    case SQUARE: return x * x;
    case CLAMP: return x < all(a) ? all(a) : x > all(b) ? all(b) : x;
    default: return x;
  }
}

// The sum of two angles, from 0 to 2 pi: in double precision, since it goes on from step to step.
inline vf turned(vf x, vf y) {
  constexpr double whole = 6.283185307179586;
  float a[W], b[W];
  store(a, x), store(b, y);
  for (int i = 0; i < W; i++) {
    const double angle = std::fmod(static_cast<double>(a[i]) + b[i], whole);
    a[i] = static_cast<float>(angle < 0 ? angle + whole : angle);
  }
  return load(a);
}

inline vf binary(i64 which, vf x, vf y, float a) {
  switch (which) {
    case ADD: return x + a * y;
    case SUB: return x - a * y;
    case MUL: return x * y;
    case DIV: return x / y;
    case MAX: return x != x ? x : larger(x, y);
    case TURN: return turned(x, y);
    default: return x != x ? x : smaller(x, y);
  }
}

inline vf get(const float* p, i64 stride, int lanes) {
  if (stride == 1) return load(p, lanes);
  if (stride == 0) return all(*p);
  float s[W] = {};
  for (int i = 0; i < lanes; i++) s[i] = p[i * stride];
  return load(s);
}
inline void put(float* p, i64 stride, vf x, int lanes) {
  if (stride == 1) return store(p, x, lanes);
  float s[W];
  store(s, x);
  for (int i = 0; i < lanes; i++) p[i * stride] = s[i];
}

// body(pointers of the N operands, count of numbers along the last axis) for this thread's share of the rows of a shape.
template <int N, class Body>
inline void along(const Run& run, const Instruction& i, Body body) {
  View v[N];
  for (int n = 0; n < N; n++) v[n] = run.view(i, n);
  const i64 outer = i.shape[0] * i.shape[1] * i.shape[2];
  for (i64 o = run.from(outer); o < run.to(outer); o++) {
    const i64 c = o % i.shape[2], b = o / i.shape[2] % i.shape[1], a = o / (i.shape[1] * i.shape[2]);
    float* p[N];
    i64 s[N];
    for (int n = 0; n < N; n++) p[n] = v[n].at(a, b, c), s[n] = v[n].stride[3];
    body(p, s);
  }
}

template <int N, class F>
inline void elementwise(const Run& run, const Instruction& i, F f) {
  along<N>(run, i, [&](float* const* p, const i64* s) {
    for (i64 k = 0; k < i.shape[3]; k += W) {
      const int lanes = static_cast<int>(i.shape[3] - k < W ? i.shape[3] - k : W);
      vf x[3] = {};
      for (int n = 1; n < N; n++) x[n - 1] = get(p[n] + k * s[n], s[n], lanes);
      put(p[0] + k * s[0], s[0], f(x), lanes);
    }
  });
}

inline void reduce(const Run& run, const Instruction& i) {
  along<2>(run, i, [&](float* const* p, const i64* s) {
    const i64 n = i.shape[3], kind = i.number[0];
    vf lanes = kind == LARGEST ? all(-__builtin_inff()) : vf{};
    i64 k = 0;
    for (; k + W <= n; k += W) {
      vf x = get(p[1] + k * s[1], s[1], W);
      lanes = kind == LENGTH ? lanes + x * x : kind == LARGEST ? (x != x ? x : larger(x, lanes)) : lanes + x;
    }
    float total = 0;
    if (kind == LARGEST) {
      float each[W];
      store(each, lanes);
      total = each[0];
      for (int j = 1; j < W; j++) total = each[j] > total || each[j] != each[j] ? each[j] : total;
    } else {
      total = sum(lanes);
    }
    for (; k < n; k++) {
      const float x = p[1][k * s[1]];
      total = kind == LENGTH ? total + x * x : kind == LARGEST ? (x > total || x != x ? x : total) : total + x;
    }
    *p[0] = kind == MEAN ? total / static_cast<float>(n) : kind == LENGTH ? std::sqrt(total) : total;
  });
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias along the last axis.
inline void layer_norm(const Run& run, const Instruction& i) {
  along<4>(run, i, [&](float* const* p, const i64* s) {
    const i64 n = i.shape[3];
    float mean = 0, square = 0;
    for (i64 k = 0; k < n; k++) mean += p[1][k * s[1]];
    mean /= static_cast<float>(n);
    for (i64 k = 0; k < n; k++) square += (p[1][k * s[1]] - mean) * (p[1][k * s[1]] - mean);
    const float scale = 1.0f / std::sqrt(square / static_cast<float>(n) + static_cast<float>(i.real[0]));
    for (i64 k = 0; k < n; k++) p[0][k * s[0]] = (p[1][k * s[1]] - mean) * scale * p[2][k * s[2]] + p[3][k * s[3]];
  });
}

inline i64 padded(i64 n) { return matvec::groups(n) * matvec::GROUP; }

// y (rows, outputs) = W x: panels are shared. Where matvec::multiply rounds x to bf16, so does this.
inline void product(const Run& run, const Instruction& i) {
  const Matrix& m = *i.matrix;
  const View y = run.view(i, 0), x = run.view(i, 1);
  const i64 rows = i.shape[0], all = matvec::panels(m.outputs), length = padded(m.inputs);
  if (rows >= matvec::MANY && matvec::in_pairs(m)) {
    float* own = run.scratch + matvec::pieces(rows) * matvec::piece_length(m);
    for (i64 i = 0; i < matvec::pieces(rows); i++) matvec::lay_piece(m, i, rows, x.data, x.stride[0], run.scratch);
    for (i64 p = run.from(all); p < run.to(all); p++) matvec::many_panel(m, p, rows, run.scratch, own, y.data, y.stride[0]);
    return;
  }
  const float* given = x.data;
  if (rows > 1 || m.inputs % matvec::GROUP) {
    matvec::interleave(m, rows, x.data, x.stride[0], run.scratch);
    given = run.scratch;
  }
  for (i64 p = run.from(all); p < run.to(all); p++) matvec::any_panel(m, p, rows, length, given, y.data, y.stride[0]);
}

// y (batch, n, m) = a (batch, n, k) b (batch, k, m): shape is batch, n, m, k.
inline void batched(const Run& run, const Instruction& i) {
  const View y = run.view(i, 0), a = run.view(i, 1), b = run.view(i, 2);
  const i64 n = i.shape[1], m = i.shape[2], inner = i.shape[3], items = i.shape[0] * n;
  for (i64 item = run.from(items); item < run.to(items); item++) {
    const i64 s = item / n, r = item % n;
    float* to = y.at(s, r);
    const float* left = a.at(s, r);
    if (b.stride[1] == 1 && b.stride[2] != 1) {  // rows of b's transpose lie in one piece: sums of products
      for (i64 c = 0; c < m; c++) {
        const float* right = b.at(s, 0, c);
        vf lanes = {};
        i64 k = 0;
        for (; k + W <= inner; k += W) lanes += get(left + k * a.stride[2], a.stride[2], W) * load(right + k);
        float total = sum(lanes);
        for (; k < inner; k++) total += left[k * a.stride[2]] * right[k];
        to[c * y.stride[2]] = total;
      }
      continue;
    }
    for (i64 c = 0; c < m; c += W) {
      const int lanes = static_cast<int>(m - c < W ? m - c : W);
      vf total = {};
      for (i64 k = 0; k < inner; k++) total += left[k * a.stride[2]] * get(b.at(s, k, c), b.stride[2], lanes);
      put(to + c * y.stride[2], y.stride[2], total, lanes);
    }
  }
}

// The vectors of channels of all rows are shared: body(row, first channel, lanes).
template <class Body>
inline void channels(const Run& run, i64 rows, i64 count, Body body) {
  const i64 blocks = (count + W - 1) / W;
  for (i64 item = run.from(rows * blocks); item < run.to(rows * blocks); item++) {
    const i64 c = item % blocks * W;
    body(item / blocks, c, static_cast<int>(count - c < W ? count - c : W));
  }
}

// shape: rows, channels. number: taps, silu, bias. Operands: y, new history; x, weight (taps, channels), history, bias.
inline void convolution(const Run& run, const Instruction& i) {
  const View y = run.view(i, 0), after = run.view(i, 1), x = run.view(i, 2), weight = run.view(i, 3), before = run.view(i, 4);
  const i64 taps = i.number[0];
  channels(run, i.shape[0], i.shape[1], [&](i64 r, i64 c, int lanes) {
    vf now = load(x.at(r, c), lanes), total = load(weight.at(taps - 1, c), lanes) * now;
    if (i.number[2]) total += load(run.view(i, 5).at(c), lanes);
    for (i64 k = 0; k < taps - 1; k++) {
      vf old = load(before.at(r, k, c), lanes);
      total += load(weight.at(k, c), lanes) * old;
      if (k) store(after.at(r, k - 1, c), old, lanes);
    }
    if (taps > 1) store(after.at(r, taps - 2, c), now, lanes);
    store(y.at(r, c), i.number[1] ? silu(total) : total, lanes);
  });
}

// shape: rows, channels, states. number: softplus, D, bias, z are there. Operands: y, new h; u, dt, A, B, C, h, D, bias, z;
// h and A lie state by state: (rows, states, channels).
inline void scan(const Run& run, const Instruction& i) {
  const View y = run.view(i, 0), after = run.view(i, 1), u = run.view(i, 2), dt = run.view(i, 3), A = run.view(i, 4),
             B = run.view(i, 5), C = run.view(i, 6), before = run.view(i, 7), D = run.view(i, 8), bias = run.view(i, 9),
             z = run.view(i, 10);
  channels(run, i.shape[0], i.shape[1], [&](i64 r, i64 c, int lanes) {
    vf d = load(dt.at(r, c), lanes), x = load(u.at(r, c), lanes);
    if (i.number[2]) d += load(bias.at(c), lanes);
    if (i.number[0]) d = softplus(d);
    vf dx = d * x, total = i.number[1] ? load(D.at(c), lanes) * x : vf{};
    for (i64 n = 0; n < i.shape[2]; n++) {
      vf h = load(before.at(r, n, c), lanes) * exp(d * load(A.at(n, c), lanes)) + dx * *B.at(r, n);
      store(after.at(r, n, c), h, lanes);
      total += h * *C.at(r, n);
    }
    if (i.number[3]) total *= silu(load(z.at(r, c), lanes));
    store(y.at(r, c), total, lanes);
  });
}

// One head's memory (keys, values), 4 vectors of values at a time: body(vectors' first column, their lanes).
template <class Body>
inline void columns(i64 values, Body body) {
  for (i64 v = 0; v < values; v += W) body(v, static_cast<int>(values - v < W ? values - v : W));
}

// shape: rows, heads, keys, values. number: query heads, decay (0 none, 1 a head, 2 a key channel), bonus, normalise.
// real: scale, eps. Operands: o, new S; q, k, v, log-decay, bonus, S.
inline void linear(const Run& run, const Instruction& i) {
  const View o = run.view(i, 0), after = run.view(i, 1), q = run.view(i, 2), k = run.view(i, 3), v = run.view(i, 4),
             g = run.view(i, 5), bonus = run.view(i, 6), before = run.view(i, 7);
  const i64 heads = i.shape[1], K = i.shape[2], V = i.shape[3], decay = i.number[1], items = i.shape[0] * heads;
  float* rate = run.scratch;
  for (i64 item = run.from(items); item < run.to(items); item++) {
    const i64 r = item / heads, h = item % heads, group = h / (heads / i.number[0]);
    const float *query = q.at(r, group), *key = k.at(r, group), *value = v.at(r, h);
    for (i64 n = 0; n < K; n++) rate[n] = decay == 2 ? g.at(r, h)[n * g.stride[2]] : decay == 1 ? *g.at(r, h) : 0.0f;
    if (decay)
      for (i64 n = 0; n < K; n += W) {
        const int lanes = static_cast<int>(K - n < W ? K - n : W);
        store(rate + n, exp(load(rate + n, lanes)), lanes);
      }
    columns(V, [&](i64 c, int lanes) {
      vf total = {}, own = load(value + c, lanes);
      float weight = 0;
      for (i64 n = 0; n < K; n++) {
        const float kn = key[n * k.stride[2]], qn = query[n * q.stride[2]];
        vf old = load(before.at(r, h, n, c), lanes), s = (decay ? old * rate[n] : old) + kn * own;
        store(after.at(r, h, n, c), s, lanes);
        if (i.number[2]) total += qn * old, weight += qn * kn * *bonus.at(h, n);
        else total += qn * s;
      }
      total = (total + weight * own) * static_cast<float>(i.real[0]);
      store(o.at(r, h, c), total, lanes);
    });
    if (i.number[3]) {  // the last column of the memory holds the sum of keys
      float total = 0;
      for (i64 n = 0; n < K; n++) {
        const float s = *before.at(r, h, n, V) * (decay ? rate[n] : 1.0f) + key[n * k.stride[2]];
        *after.at(r, h, n, V) = s;
        total += query[n * q.stride[2]] * s;
      }
      const float by = 1.0f / (total * static_cast<float>(i.real[0]) + static_cast<float>(i.real[1]));
      columns(V, [&](i64 c, int lanes) { store(o.at(r, h, c), load(o.at(r, h, c), lanes) * by, lanes); });
    }
  }
}

// shape as for `linear`. number: decay (0, 1, 2), beta, low rank. real: scale.
// Operands: o, new S; q, k, v, beta, log-decay, a, b, S.
//   beta:      S <- exp(g) S + k (beta (v - (exp(g) S)^T k))^T
//   low rank:  S <- exp(g) S + b (a^T S) + k v^T
inline void delta(const Run& run, const Instruction& i) {
  const View o = run.view(i, 0), after = run.view(i, 1), q = run.view(i, 2), k = run.view(i, 3), v = run.view(i, 4),
             beta = run.view(i, 5), g = run.view(i, 6), a = run.view(i, 7), b = run.view(i, 8), before = run.view(i, 9);
  const i64 heads = i.shape[1], K = i.shape[2], V = i.shape[3], decay = i.number[0], items = i.shape[0] * heads;
  float *rate = run.scratch, *recall = rate + padded(K);
  for (i64 item = run.from(items); item < run.to(items); item++) {
    const i64 r = item / heads, h = item % heads;
    const float *query = q.at(r, h), *key = k.at(r, h), *left = i.number[2] ? a.at(r, h) : nullptr,
                *right = i.number[2] ? b.at(r, h) : nullptr;
    for (i64 n = 0; n < K; n++) rate[n] = decay == 2 ? g.at(r, h)[n * g.stride[2]] : decay == 1 ? *g.at(r, h) : 0.0f;
    for (i64 n = 0; n < K; n += W) {
      const int lanes = static_cast<int>(K - n < W ? K - n : W);
      store(rate + n, exp(load(rate + n, lanes)), lanes);
    }
    for (i64 n = 0; n < K; n++) recall[n] = left ? left[n * a.stride[2]] : rate[n] * key[n * k.stride[2]];
    columns(V, [&](i64 c, int lanes) {
      vf recalled = {}, total = {}, own = load(v.at(r, h, c), lanes);
      for (i64 n = 0; n < K; n++) recalled += recall[n] * load(before.at(r, h, n, c), lanes);
      vf write = i.number[1] ? *beta.at(r, h) * (own - recalled) : own;
      for (i64 n = 0; n < K; n++) {
        vf s = load(before.at(r, h, n, c), lanes) * rate[n] + key[n * k.stride[2]] * write;
        if (right) s += right[n * b.stride[2]] * recalled;
        store(after.at(r, h, n, c), s, lanes);
        total += query[n * q.stride[2]] * s;
      }
      store(o.at(r, h, c), total * static_cast<float>(i.real[0]), lanes);
    });
  }
}

// shape: rows, channels. Operands: y, new num, den, max; k, v, w, u, num, den, max; all but k and v in one piece.
inline void sums(const Run& run, const Instruction& i) {
  View p[11];
  for (int n = 0; n < 11; n++) p[n] = run.view(i, n);
  Wkv s = {};
  s.batch = i.shape[0], s.time = 1, s.channels = i.shape[1];
  s.k = p[4].data, s.v = p[5].data, s.w = p[6].data, s.u = p[7].data, s.num = p[8].data, s.den = p[9].data, s.max = p[10].data;
  s.k_batch = p[4].stride[0], s.v_batch = p[5].stride[0];
  s.y = p[0].data, s.new_num = p[1].data, s.new_den = p[2].data, s.new_max = p[3].data;
  const i64 panels = (s.channels + ::wkv::P * W - 1) / (::wkv::P * W), items = s.batch * panels;
  for (i64 item = run.from(items); item < run.to(items); item++) {
    const i64 row = item / panels, panel = item % panels;
    if ((panel + 1) * ::wkv::P * W <= s.channels) ::wkv::forward(s, ::wkv::Panel<true>(s, row, panel));
    else ::wkv::forward(s, ::wkv::Panel<false>(s, row, panel));
  }
}

// Softmax attention of one step; the step's own key and value are written into the cache.
// shape: rows, heads, key channels, value channels. number: heads of keys, window or 0, region of the positions (int64),
// region whose address is the number of slots a row. real: scale.
// Operands: o, new keys, new values; q, k, v, keys, values. Without a window keys and new keys are the same cache, with
// room for the step; with one of w steps they hold the last w - 1, the newest last.
inline void attend(const Run& run, const Instruction& i) {
  const View o = run.view(i, 0), q = run.view(i, 3), k = run.view(i, 4), v = run.view(i, 5);
  View new_keys = run.view(i, 1), new_values = run.view(i, 2), keys = run.view(i, 6), values = run.view(i, 7);
  const i64 heads = i.shape[1], K = i.shape[2], V = i.shape[3], groups = i.number[0], window = i.number[1], each = heads / groups;
  const i64* positions = static_cast<const i64*>(run.regions[i.number[2]]);
  const i64 slots = reinterpret_cast<i64>(run.regions[i.number[3]]);
  for (View* cache : {&new_keys, &new_values, &keys, &values}) cache->stride[0] = slots * cache->stride[1];
  const float scale = static_cast<float>(i.real[0]);
  constexpr i64 BLOCK = 64;
  float *scores = run.scratch, *query = scores + BLOCK, *total = query + padded(K);
  for (i64 item = run.from(i.shape[0] * groups); item < run.to(i.shape[0] * groups); item++) {
    const i64 r = item / groups, g = item % groups, past = positions[r];
    const i64 first = window && past < window - 1 ? window - 1 - past : 0, last = window ? window - 1 : past;
    if (!window) {
      for (i64 n = 0; n < K; n++) *new_keys.at(r, past, g, n) = k.at(r, g)[n * k.stride[2]];
      for (i64 n = 0; n < V; n++) *new_values.at(r, past, g, n) = v.at(r, g)[n * v.stride[2]];
    }
    for (i64 e = 0; e < each; e++) {
      const i64 h = g * each + e;
      for (i64 n = 0; n < K; n++) query[n] = q.at(r, h)[n * q.stride[2]] * scale;
      float most = 0, sum_own = 1;  // the step itself comes first
      for (i64 n = 0; n < K; n++) most += query[n] * k.at(r, g)[n * k.stride[2]];
      for (i64 n = 0; n < V; n++) total[n] = v.at(r, g)[n * v.stride[2]];
      for (i64 s = first; s < last; s += BLOCK) {
        const i64 count = last - s < BLOCK ? last - s : BLOCK;
        float highest = most;
        for (i64 j = 0; j < count; j++) {
          const float* key = keys.at(r, s + j, g);
          vf lanes = {};
          i64 n = 0;
          for (; n + W <= K; n += W) lanes += load(query + n) * load(key + n);
          float score = sum(lanes);
          for (; n < K; n++) score += query[n] * key[n];
          scores[j] = score;
          highest = score > highest || score != score ? score : highest;
        }
        if (highest != most) {
          const float less = std::exp(most - highest);
          sum_own *= less;
          for (i64 n = 0; n < V; n++) total[n] *= less;
          most = highest;
        }
        for (i64 j = 0; j < count; j += W) {
          const int lanes = static_cast<int>(count - j < W ? count - j : W);
          vf p = exp(load(scores + j, lanes) - most);
          store(scores + j, p, lanes);
          for (int l = 0; l < lanes; l++) sum_own += p[l];
        }
        columns(V, [&](i64 c, int lanes) {
          vf t = load(total + c, lanes);
          for (i64 j = 0; j < count; j++) t += scores[j] * load(values.at(r, s + j, g, c), lanes);
          store(total + c, t, lanes);
        });
      }
      for (i64 n = 0; n < V; n++) o.at(r, h)[n * o.stride[2]] = total[n] / sum_own;
    }
    if (window > 1) {
      for (i64 s = 0; s + 1 < window - 1; s++) {
        for (i64 n = 0; n < K; n++) *new_keys.at(r, s, g, n) = *keys.at(r, s + 1, g, n);
        for (i64 n = 0; n < V; n++) *new_values.at(r, s, g, n) = *values.at(r, s + 1, g, n);
      }
      for (i64 n = 0; n < K; n++) *new_keys.at(r, window - 2, g, n) = k.at(r, g)[n * k.stride[2]];
      for (i64 n = 0; n < V; n++) *new_values.at(r, window - 2, g, n) = v.at(r, g)[n * v.stride[2]];
    }
  }
}

// A memory for each scale of the past, as in a Fenwick tree: level l is of the 2^(l-1) steps that bit l-1 of the position
// stands for, the last level of all older ones; where the bit is 0 it holds zeros. The step, and the levels of the 1s at the
// position's end, become one: a carry.
// shape: rows, heads, keys, values. number: levels, region of the positions (int64). real: scale.
// Operands: o, new S; q, k, v, log-decay, weights (of the step itself, then of the levels), S by rows, levels, heads, keys.
inline void fenwick(const Run& run, const Instruction& i) {
  const View o = run.view(i, 0), after = run.view(i, 1), q = run.view(i, 2), k = run.view(i, 3), v = run.view(i, 4),
             g = run.view(i, 5), weight = run.view(i, 6), before = run.view(i, 7);
  const i64 heads = i.shape[1], K = i.shape[2], V = i.shape[3], levels = i.number[0], items = i.shape[0] * heads;
  const i64* positions = static_cast<const i64*>(run.regions[i.number[1]]);
  for (i64 item = run.from(items); item < run.to(items); item++) {
    const i64 r = item / heads, h = item % heads, past = positions[r];
    const auto filled = [&](i64 l) { return l < levels ? past >> (l - 1) & 1 : past >> (l - 1) != 0; };
    i64 into = 1;
    while (into < levels && filled(into)) into++;
    const float *query = q.at(r, h), *key = k.at(r, h), fade = std::exp(*g.at(r, h)), scale = static_cast<float>(i.real[0]);
    float match = 0, *total = run.scratch;
    for (i64 n = 0; n < K; n++) match += query[n * q.stride[2]] * key[n * k.stride[2]];
    match *= *weight.at(r, h, 0);
    columns(V, [&](i64 c, int lanes) { store(total + c, match * load(v.at(r, h, c), lanes), lanes); });
    for (i64 l = into + 1; l <= levels; l++) {
      if (!filled(l) && after.data == before.data) continue;
      for (i64 n = 0; n < K; n++) {
        const float *old = before.at(r, l - 1, h, n), share = *weight.at(r, h, l) * query[n * q.stride[2]];
        float* to = after.at(r, l - 1, h, n);
        columns(V, [&](i64 c, int lanes) {
          vf s = filled(l) ? load(old + c, lanes) * fade : vf{};
          store(to + c, s, lanes);
          store(total + c, load(total + c, lanes) + share * s, lanes);
        });
      }
    }
    for (i64 n = 0; n < K; n++)
      columns(V, [&](i64 c, int lanes) {
        vf s = key[n * k.stride[2]] * load(v.at(r, h, c), lanes), read = {};
        for (i64 l = 1; l <= into; l++) {
          if (filled(l)) {
            vf old = load(before.at(r, l - 1, h, n) + c, lanes) * fade;
            s += old, read += *weight.at(r, h, l) * old;
          }
          store(after.at(r, l - 1, h, n) + c, l < into ? vf{} : s, lanes);
        }
        store(total + c, load(total + c, lanes) + query[n * q.stride[2]] * read, lanes);
      });
    columns(V, [&](i64 c, int lanes) { store(o.at(r, h, c), load(total + c, lanes) * scale, lanes); });
  }
}

// A step more. shape: rows. number: regions of the positions and of the new ones.
inline void advance(const Run& run, const Instruction& i) {
  const i64* positions = static_cast<const i64*>(run.regions[i.number[0]]);
  i64* next = static_cast<i64*>(run.regions[i.number[1]]);
  for (i64 r = 0; r < i.shape[0]; r++) next[r] = positions[r] + 1;
}

// Rotary positions. shape: rows, heads, channels. number: turned channels, region of the positions. Operands: y; x, angles
// a step of each pair, in halves of 64-bit numbers: see the caller.
inline void rotate(const Run& run, const Instruction& i) {
  const View y = run.view(i, 0), x = run.view(i, 1);
  const double* speed = reinterpret_cast<const double*>(run.view(i, 2).data);
  const i64* positions = static_cast<const i64*>(run.regions[i.number[1]]);
  const i64 half = i.number[0] / 2;
  for (i64 r = 0; r < i.shape[0]; r++) {
    for (i64 n = 0; n < half; n++) {
      const double angle = static_cast<double>(positions[r]) * speed[n];
      const float c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
      for (i64 h = 0; h < i.shape[1]; h++) {
        const float a = *x.at(r, h, n), b = *x.at(r, h, n + half);
        *y.at(r, h, n) = a * c - b * s, *y.at(r, h, n + half) = b * c + a * s;
      }
    }
    for (i64 h = 0; h < i.shape[1]; h++)
      for (i64 n = 2 * half; n < i.shape[2]; n++) *y.at(r, h, n) = *x.at(r, h, n);
  }
}

// y[..., n] = x[..., index[n]]. Operands: y, x, whole 64-bit numbers in one piece.
inline void gather(const Run& run, const Instruction& i) {
  const i64* index = reinterpret_cast<const i64*>(run.view(i, 2).data);
  along<2>(run, i, [&](float* const* p, const i64* s) {
    for (i64 n = 0; n < i.shape[3]; n++) p[0][n * s[0]] = p[1][index[n] * s[1]];
  });
}

inline void instruction(const Run& run, const Instruction& i) {
  const float a = static_cast<float>(i.real[0]), b = static_cast<float>(i.real[1]);
  switch (i.op) {
    case UNARY: return elementwise<2>(run, i, [&](const vf* x) { return unary(i.number[0], x[0], a, b); });
    case BINARY: return elementwise<3>(run, i, [&](const vf* x) { return binary(i.number[0], x[0], x[1], a); });
    case LERP: return elementwise<4>(run, i, [&](const vf* x) { return x[0] + x[2] * (x[1] - x[0]); });
    case REDUCE: return reduce(run, i);
    case LAYER_NORM: return layer_norm(run, i);
    case PRODUCT: return product(run, i);
    case BATCHED: return batched(run, i);
    case CONVOLUTION: return convolution(run, i);
    case SCAN: return scan(run, i);
    case LINEAR: return linear(run, i);
    case DELTA: return delta(run, i);
    case WKV: return sums(run, i);
    case ATTEND: return attend(run, i);
    case ADVANCE: return advance(run, i);
    case ROTATE: return rotate(run, i);
    case GATHER: return gather(run, i);
    case FENWICK: return fenwick(run, i);
  }
}

void run(const Program& p, void* const* regions) {
  int threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
  if (threads > p.threads) threads = static_cast<int>(p.threads);
#endif
  const i64 own = (p.scratch + 15) / 16 * 16;  // whole cache lines, so that no two threads write into one
  Buffer scratch(threads * own);
  if (scratch.missing()) return;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    int thread = 0, count = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num(), count = omp_get_num_threads();
#endif
    float* const mine = scratch + thread * own;
    const Run all{p, regions, mine, thread, count}, alone{p, regions, mine, 0, 1};
    for (i64 n = 0; n < p.instructions; n++) {
      const Instruction& i = p.list[n];
#ifdef _OPENMP
      if (i.wait && count > 1) {
#pragma omp barrier
      }
#endif
      if (i.shared) instruction(all, i);
      else if (!thread) instruction(alone, i);
    }
  }
}

}  // namespace program
