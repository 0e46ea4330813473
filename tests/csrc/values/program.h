// The interpreter of decoding: each of its instructions against plain loops in double precision, by two threads, and what a
// program of several makes of them.
#pragma once

#include <deque>
#include <functional>

#include "products.h"

namespace {

// A strided operand of up to four axes: NaN lies between its rows, and `every` numbers apart are those of a row.
struct Strided {
  std::vector<i64> axes;
  Operand operand = {-1, 0, {}};
  std::vector<float> data;

  Strided(std::initializer_list<i64> of, i64 gap, i64 every) : axes(of) {
    i64 stride = every;
    for (size_t n = axes.size(); n--; gap = 0) operand.stride[n] = stride, stride = stride * axes[n] + gap;
    data = blank(stride);
    operand.at = reinterpret_cast<i64>(data.data());
  }
  i64 place(i64 a, i64 b, i64 c, i64 d) const {
    const i64* s = operand.stride;
    return a * s[0] + b * s[1] + c * s[2] + d * s[3];
  }
  double operator()(i64 a, i64 b = 0, i64 c = 0, i64 d = 0) const { return data[place(a, b, c, d)]; }
  // body(number, its indices) for each that there is.
  void each(const std::function<void(float&, i64, i64, i64, i64)>& body) {
    auto axis = [&](size_t n) { return n < axes.size() ? axes[n] : 1; };
    for (i64 a = 0; a < axis(0); a++)
      for (i64 b = 0; b < axis(1); b++)
        for (i64 c = 0; c < axis(2); c++)
          for (i64 d = 0; d < axis(3); d++) body(data[place(a, b, c, d)], a, b, c, d);
  }
};

// One instruction: its operands in order, results first.
struct Step {
  Case c;
  Instruction i = {};
  std::deque<Strided> held;
  std::vector<Operand> operands;
  std::vector<void*> regions = {nullptr};

  Step(std::string name, i64 op, std::initializer_list<i64> shape) : c(std::move(name)) {
    i.op = op, i.shared = 1;
    i64 n = 0;
    for (i64 size : shape) i.shape[n++] = size;
  }
  Strided& result(std::initializer_list<i64> axes, i64 gap = 3, i64 every = 1) {
    held.emplace_back(axes, gap, every);
    operands.push_back(held.back().operand);
    return held.back();
  }
  Strided& input(std::initializer_list<i64> axes, float low = -1, float high = 1, i64 gap = 3, i64 every = 1) {
    Strided& x = result(axes, gap, every);
    x.each([&](float& to, i64, i64, i64, i64) { to = drawn(low, high); });
    return x;
  }
  i64 region(void* p) {
    regions.push_back(p);
    return static_cast<i64>(regions.size()) - 1;
  }
  void run(i64 scratch) {
    Program p = {1, 1, scratch, 2, &i, operands.data()};
    bestiary_program(&p, regions.data());
  }
  // What a result should be, from its indices; nothing is written beside it.
  template <class Wanted>
  void is(const char* what, Strided& found, Wanted wanted) {
    std::vector<double> all(found.data.size(), NaN);
    found.each([&](float& at, i64 a, i64 b, i64 c, i64 d) { all[&at - found.data.data()] = wanted(a, b, c, d); });
    c.compare(what, found.data, all);
  }
};

i64 in_groups(i64 n) { return (n + 31) / 32 * 32; }

double unary(i64 which, double x, double a, double b) {
  const double cubic = 0.7978845608028654 * (x + 0.044715 * x * x * x);
  const double found[] = {x, -x, std::exp(x), sigmoid(x), x * sigmoid(x), std::tanh(x), x < 0 ? 0 : x, softplus(x), -softplus(-x),
                          x * std::erfc(-x / std::sqrt(2.0)) / 2, x * (1 + std::tanh(cubic)) / 2, x < 0 ? std::expm1(x) : x,
                          std::sqrt(x), 1 / std::sqrt(x), 1 / x, std::fabs(x), std::log(x), std::expm1(x), std::sin(x),
                          std::cos(x), a * x + b, x * x, x < a ? a : x > b ? b : x};
  return found[which];
}

// Numbers one by one, along rows that lie apart: every: of a number's neighbours.
void elementwise(i64 n, i64 every) {
  for (i64 which = program::COPY; which <= program::CLAMP; which++) {
    Step s(named("unary", {which, n, every}), program::UNARY, {2, 1, 3, n});
    const bool positive = which >= program::SQRT && which <= program::RECIPROCAL;
    auto& y = s.result({2, 1, 3, n}, 3, every);
    auto& x = s.input({2, 1, 3, n}, positive || which == program::LOG ? 0.1f : -3, 3, 1, every);
    s.i.number[0] = which, s.i.real[0] = -0.5, s.i.real[1] = 0.75, s.run(0);
    s.is("y", y, [&](i64 a, i64 b, i64 c, i64 d) { return unary(which, x(a, b, c, d), -0.5, 0.75); });
  }
  for (i64 which = program::ADD; which <= program::MIN; which++) {
    Step s(named("binary", {which, n, every}), program::BINARY, {2, 1, 3, n});
    auto &y = s.result({2, 1, 3, n}, 3, every), &x = s.input({2, 1, 3, n}, -1, 1, 1, every);
    auto& z = s.input({2, 1, 3, 1}, 1, 2);  // one for a row
    if (which > program::DIV) z.each([](float& at, i64, i64, i64, i64) { at -= 1.5f; });
    s.operands[2].stride[3] = 0, s.i.number[0] = which, s.i.real[0] = 0.5, s.run(0);
    s.is("y", y, [&](i64 a, i64 b, i64 c, i64 d) {
      const double l = x(a, b, c, d), r = z(a, b, c);
      const double found[] = {l + r / 2, l - r / 2, l * r, l / r, l > r ? l : r, l < r ? l : r};
      return found[which];
    });
  }
  Step t(named("turn", {n, every}), program::BINARY, {2, 1, 3, n});
  auto &angle = t.result({2, 1, 3, n}, 3, every), &old = t.input({2, 1, 3, n}, -3, 3, 1, every), &more = t.input({2, 1, 3, n}, -9, 9);
  if (every > 1) t.operands[2].stride[3] = 1;
  t.i.number[0] = program::TURN, t.run(0);
  t.is("y", angle, [&](i64 a, i64 b, i64 c, i64 d) {
    const double circle = 6.283185307179586, sum = old(a, b, c, d) + more(a, b, c, d);
    return sum - circle * std::floor(sum / circle);
  });
  Step g(named("gather", {n, every}), program::GATHER, {2, 1, 3, n + 2});
  auto &taken = g.result({2, 1, 3, n + 2}, 3, every), &of = g.input({2, 1, 3, n}, -1, 1, 1, every);
  std::vector<i64> index;
  for (i64 d = 0; d < n + 2; d++) index.push_back(d * 7 % n);
  g.operands.push_back({-1, reinterpret_cast<i64>(index.data()), {}}), g.run(0);
  g.is("y", taken, [&](i64 a, i64 b, i64 c, i64 d) { return of(a, b, c, index[d]); });
  for (i64 which = program::SUM; which <= program::LENGTH; which++) {
    Step s(named("reduce", {which, n, every}), program::REDUCE, {2, 1, 3, n});
    auto &y = s.result({2, 1, 3, 1}), &x = s.input({2, 1, 3, n}, -1, 1, 1, every);
    s.operands[0].stride[3] = 0, s.i.number[0] = which, s.run(0);
    s.is("y", y, [&](i64 a, i64 b, i64 c, i64) {
      double sum = 0, most = x(a, b, c), squares = 0;
      for (i64 d = 0; d < n; d++) sum += x(a, b, c, d), squares += x(a, b, c, d) * x(a, b, c, d);
      for (i64 d = 0; d < n; d++) most = x(a, b, c, d) > most ? x(a, b, c, d) : most;
      const double found[] = {sum, sum / static_cast<double>(n), most, std::sqrt(squares)};
      return found[which];
    });
  }
  Step l(named("lerp", {n, every}), program::LERP, {2, 1, 3, n});
  auto &y = l.result({2, 1, 3, n}, 3, every), &from = l.input({2, 1, 3, n}, -1, 1, 1, every), &to = l.input({2, 1, 3, n});
  auto& share = l.input({2, 1, 3, n}, 0, 1);
  if (every > 1) l.operands[2].stride[3] = l.operands[3].stride[3] = 1;
  l.run(0);
  l.is("y", y, [&](i64 a, i64 b, i64 c, i64 d) {
    return from(a, b, c, d) + share(a, b, c, d) * (to(a, b, c, d) - from(a, b, c, d));
  });
  Step m(named("layer norm", {n, every}), program::LAYER_NORM, {2, 1, 3, n});
  auto &z = m.result({2, 1, 3, n}, 3, every), &x = m.input({2, 1, 3, n}, -1, 2, 1, every), &weight = m.input({n}), &bias = m.input({n});
  for (int k : {2, 3}) m.operands[k].stride[3] = m.operands[k].stride[0], m.operands[k].stride[0] = 0;
  m.i.real[0] = 0.01, m.run(0);
  m.is("y", z, [&](i64 a, i64 b, i64 c, i64 d) {
    double mean = 0, squares = 0;
    for (i64 k = 0; k < n; k++) mean += x(a, b, c, k) / static_cast<double>(n);
    for (i64 k = 0; k < n; k++) squares += (x(a, b, c, k) - mean) * (x(a, b, c, k) - mean) / static_cast<double>(n);
    return (x(a, b, c, d) - mean) / std::sqrt(squares + 0.01) * weight(d) + bias(d);
  });
}

// A packed matrix times rows, and the products of two operands.
void products(i64 n, i64 rows, i64 format) {
  Step s(named("product", {n, rows, format}), program::PRODUCT, {rows});
  Packed p(33, n, format, true);
  auto &y = s.result({rows, 33}), &x = s.input({rows, n});
  s.i.matrix = &p.m, s.run(rows * in_groups(n));
  s.is("y", y, [&](i64 r, i64 j, i64, i64) {
    std::vector<double> row;
    for (i64 k = 0; k < n; k++) row.push_back(x(r, k));
    return p.times(row)[j];
  });
}
void batched(i64 n, i64 inner, bool turned) {
  Step s(named("batched", {n, inner, turned}), program::BATCHED, {3, 2, n, inner});
  auto &y = s.result({3, 2, n}), &a = s.input({3, 2, inner}), &b = turned ? s.input({3, n, inner}) : s.input({3, inner, n});
  if (turned) std::swap(s.operands[2].stride[1], s.operands[2].stride[2]);
  s.run(0);
  s.is("y", y, [&](i64 i, i64 r, i64 c, i64) {
    double sum = 0;
    for (i64 k = 0; k < inner; k++) sum += a(i, r, k) * (turned ? b(i, c, k) : b(i, k, c));
    return sum;
  });
}

void convolution_step(i64 n, i64 taps, bool activated) {
  Step s(named("convolution", {n, taps, activated}), program::CONVOLUTION, {2, n});
  auto &y = s.result({2, n}), &after = s.result({2, taps - 1, n}), &x = s.input({2, n}), &weight = s.input({taps, n});
  auto &before = s.input({2, taps - 1, n}), &bias = s.input({n});
  s.i.number[0] = taps, s.i.number[1] = s.i.number[2] = activated, s.run(0);
  s.is("y", y, [&](i64 r, i64 d, i64, i64) {
    double sum = weight(taps - 1, d) * x(r, d) + (activated ? bias(d) : 0);
    for (i64 k = 0; k + 1 < taps; k++) sum += weight(k, d) * before(r, k, d);
    return activated ? sum * sigmoid(sum) : sum;
  });
  s.is("after", after, [&](i64 r, i64 k, i64 d, i64) { return k + 2 < taps ? before(r, k + 1, d) : x(r, d); });
}

void scan_step(i64 n, i64 states, bool gated) {
  Step s(named("scan", {n, states, gated}), program::SCAN, {2, n, states});
  auto &y = s.result({2, n}), &after = s.result({2, states, n}), &u = s.input({2, n}), &dt = s.input({2, n}, gated ? -2 : 0);
  auto &A = s.input({states, n}, -50, 0), &B = s.input({2, states}), &C = s.input({2, states}), &before = s.input({2, states, n});
  auto &D = s.input({n}), &bias = s.input({n}), &z = s.input({2, n});
  for (int k = 0; k < 4; k++) s.i.number[k] = gated;
  s.run(0);
  auto state = [&](i64 r, i64 i, i64 d, i64) {
    const double step = gated ? softplus(dt(r, d) + bias(d)) : dt(r, d);
    return std::exp(step * A(i, d)) * before(r, i, d) + step * B(r, i) * u(r, d);
  };
  s.is("after", after, state);
  s.is("y", y, [&](i64 r, i64 d, i64, i64) {
    double sum = gated ? D(d) * u(r, d) : 0;
    for (i64 i = 0; i < states; i++) sum += C(r, i) * state(r, i, d, 0);
    return gated ? sum * z(r, d) * sigmoid(z(r, d)) : sum;
  });
}

// decay: none, a head's, a key channel's; more: a normaliser, else a bonus.
void linear_step(i64 keys, i64 n, i64 decay, bool more, float strength) {
  Step s(named("linear", {keys, n, decay, more, static_cast<i64>(strength)}), program::LINEAR, {2, 4, keys, n});
  const float least = more ? 0.1f : -1;
  auto &o = s.result({2, 4, n}), &after = s.result({2, 4, keys, n + more}), &q = s.input({2, 2, keys}, least, 1, 3, 2);
  auto &k = s.input({2, 2, keys}, least, 1, 1, 3), &v = s.input({2, 4, n}), &g = s.input({2, 4, decay == 2 ? keys : 1}, -strength, 0);
  auto &u = s.input({4, keys}), &before = s.input({2, 4, keys, n + more}, least);
  s.i.number[0] = 2, s.i.number[1] = decay, s.i.number[2] = !more, s.i.number[3] = more, s.i.real[0] = 0.5, s.i.real[1] = 0.125;
  s.run(2 * in_groups(keys));
  auto written = [&](i64 r, i64 h, i64 i, i64 j) { return k(r, h / 2, i) * (j < n ? v(r, h, j) : 1); };
  auto state = [&](i64 r, i64 h, i64 i, i64 j) {
    const double fade = decay ? std::exp(g(r, h, decay == 2 ? i : 0)) : 1;
    return fade * before(r, h, i, j) + written(r, h, i, j);
  };
  auto found = [&](i64 r, i64 h, i64 j) {
    double sum = 0;
    for (i64 i = 0; i < keys; i++)
      sum += q(r, h / 2, i) * (more ? state(r, h, i, j) : before(r, h, i, j) + u(h, i) * written(r, h, i, j)) / 2;
    return sum;
  };
  s.is("after", after, state);
  s.is("o", o, [&](i64 r, i64 h, i64 j, i64) { return more ? found(r, h, j) / (found(r, h, n) + 0.125) : found(r, h, j); });
}

// low: b (a^T S) in the place of beta.
void delta_step(i64 keys, i64 n, i64 decay, bool low, float strength) {
  Step s(named("delta", {keys, n, decay, low, static_cast<i64>(strength)}), program::DELTA, {2, 4, keys, n});
  auto &o = s.result({2, 4, n}), &after = s.result({2, 4, keys, n}), &q = s.input({2, 4, keys}, -1, 1, 3, 2);
  auto &k = s.input({2, 4, keys}, -1, 1, 1, 3), &v = s.input({2, 4, n}), &beta = s.input({2, 4, 1}, 0, 2);
  auto &g = s.input({2, 4, decay == 2 ? keys : 1}, -strength, 0), &a = s.input({2, 4, keys}, -1, 1, 3, 2);
  auto &b = s.input({2, 4, keys}, -1, 1, 3, 2), &before = s.input({2, 4, keys, n});
  s.i.number[0] = decay, s.i.number[1] = !low, s.i.number[2] = low, s.i.real[0] = 0.5, s.run(2 * in_groups(keys));
  auto faded = [&](i64 r, i64 h, i64 i, i64 j) {
    return (decay ? std::exp(g(r, h, decay == 2 ? i : 0)) : 1) * before(r, h, i, j);
  };
  auto state = [&](i64 r, i64 h, i64 i, i64 j) {
    double z = 0;
    for (i64 m = 0; m < keys; m++) z += low ? a(r, h, m) * before(r, h, m, j) : k(r, h, m) * faded(r, h, m, j);
    const double write = low ? v(r, h, j) : beta(r, h) * (v(r, h, j) - z);
    return faded(r, h, i, j) + k(r, h, i) * write + (low ? b(r, h, i) * z : 0);
  };
  s.is("after", after, state);
  s.is("o", o, [&](i64 r, i64 h, i64 j, i64) {
    double sum = 0;
    for (i64 i = 0; i < keys; i++) sum += q(r, h, i) * state(r, h, i, j) / 2;
    return sum;
  });
}

// Levels whose bit of the position is 0 hold zeros; `same`: the memory is written over.
void fenwick_step(i64 keys, i64 n, i64 levels, i64 past, bool same) {
  Step s(named("fenwick", {keys, n, levels, past, same}), program::FENWICK, {2, 4, keys, n});
  i64 positions[2] = {past, past / 2};
  auto filled = [&](i64 r, i64 l) { return l + 1 < levels ? positions[r] >> l & 1 : positions[r] >> l != 0; };
  auto &o = s.result({2, 4, n}), &after = s.result({2, levels, 4, keys * n}, 0), &q = s.input({2, 4, keys}, -1, 1, 3, 2);
  auto &k = s.input({2, 4, keys}, -1, 1, 1, 3), &v = s.input({2, 4, n}), &g = s.input({2, 4, 1}, -1, 0);
  auto &weight = s.input({2, 4, levels + 1}), &before = s.input({2, levels, 4, keys * n}, -1, 1, 0);
  before.each([&](float& at, i64 r, i64 l, i64, i64) { at = filled(r, l) ? at : 0; });
  const Strided old = before;
  if (same) after.data = before.data, s.operands[7] = s.operands[1];
  for (int m : {1, 7}) s.operands[m].stride[3] = n;
  s.i.number[0] = levels, s.i.number[1] = s.region(positions), s.i.real[0] = 0.5, s.run(in_groups(n));
  auto faded = [&](i64 r, i64 l, i64 h, i64 at) { return std::exp(g(r, h)) * old(r, l, h, at); };
  s.is("o", o, [&](i64 r, i64 h, i64 j, i64) {
    double sum = 0;
    for (i64 i = 0; i < keys; i++) {
      sum += q(r, h, i) * weight(r, h, 0) * k(r, h, i) * v(r, h, j) / 2;
      for (i64 l = 0; l < levels; l++) sum += q(r, h, i) * weight(r, h, l + 1) * faded(r, l, h, i * n + j) / 2;
    }
    return sum;
  });
  s.is("after", after, [&](i64 r, i64 l, i64 h, i64 at) {
    i64 into = 0;  // the levels before it are full, and are carried into it
    while (into + 1 < levels && filled(r, into)) into++;
    if (l < into) return 0.0;
    if (l > into) return faded(r, l, h, at);
    double sum = k(r, h, at / n) * v(r, h, at % n);
    for (i64 m = 0; m <= into; m++) sum += faded(r, m, h, at);
    return sum;
  });
}

// The sums come in a unit of the kernel's choice: they are compared as shares of den.
void wkv_step(i64 n, float size) {
  Step s(named("wkv step", {n, static_cast<i64>(size)}), program::WKV, {2, n});
  auto &y = s.result({2, n}, 0), &num = s.result({2, n}, 0), &den = s.result({2, n}, 0), &most = s.result({2, n}, 0);
  auto &k = s.input({2, n}, -size, size), &v = s.input({2, n}), &w = s.input({n}, -size, 0, 0), &u = s.input({n}, -1, 1, 0);
  auto &old_num = s.input({2, n}, -1, 1, 0), &old_den = s.input({2, n}, 0.5f, 1, 0), &old_most = s.input({2, n}, -size, size, 0);
  old_most.each([](float& at, i64, i64, i64, i64) { at = std::nearbyint(at); });
  s.run(0);
  auto sum = [&](i64 r, i64 d, bool of_values, double past, double now) {
    return std::exp(past + old_most(r, d)) * (of_values ? old_num : old_den)(r, d) + std::exp(now + k(r, d)) * (of_values ? v(r, d) : 1);
  };
  s.is("y", y, [&](i64 r, i64 d, i64, i64) { return sum(r, d, true, 0, u(d)) / sum(r, d, false, 0, u(d)); });
  num.each([&](float& at, i64 r, i64 d, i64, i64) { at /= static_cast<float>(den(r, d)); });
  s.is("num", num, [&](i64 r, i64 d, i64, i64) { return sum(r, d, true, w(d), 0) / sum(r, d, false, w(d), 0); });
  den.each([&](float& at, i64 r, i64 d, i64, i64) {
    at = static_cast<float>(at * std::exp(most(r, d)) / sum(r, d, false, w(d), 0));
  });
  s.is("den", den, [&](i64, i64, i64, i64) { return 1; });
}

// Rows with different pasts. Slots that hold nothing yet are NaN.
void attend_step(i64 keys, i64 n, i64 window, i64 past) {
  Step s(named("attend", {keys, n, window, past}), program::ATTEND, {2, 4, keys, n});
  const i64 slots = window ? window - 1 : past + 1;
  i64 positions[2] = {past, past / 2};
  auto& o = s.result({2, 4, n}, 3, 2);
  Strided *after[2], *held[2];
  for (int m : {0, 1}) after[m] = window ? &s.result({2, slots, 2, m ? n : keys}) : &s.input({2, slots, 2, m ? n : keys});
  auto &q = s.input({2, 4, keys}, -2, 2, 3, 2), &k = s.input({2, 2, keys}, -2, 2, 3, 2), &v = s.input({2, 2, n}, -1, 1, 3, 2);
  for (int m : {0, 1}) {
    held[m] = window ? &s.input({2, slots, 2, m ? n : keys}) : after[m];
    if (!window) s.operands.push_back(held[m]->operand);
    held[m]->each([&](float& at, i64 r, i64 slot, i64, i64) {
      if (window ? slot < window - 1 - positions[r] : slot >= positions[r]) at = NaN;
    });
  }
  const Strided old[2] = {*held[0], *held[1]};
  s.i.number[0] = 2, s.i.number[1] = window, s.i.number[2] = s.region(positions);
  s.i.number[3] = s.region(reinterpret_cast<void*>(slots)), s.i.real[0] = 0.5;
  s.run(64 + 2 * in_groups(keys > n ? keys : n));
  s.is("o", o, [&](i64 r, i64 h, i64 j, i64) {
    const i64 first = !window ? 0 : positions[r] < window - 1 ? window - 1 - positions[r] : 0, end = window ? slots : positions[r];
    double sum = 0, total = 0;
    for (i64 slot = first; slot <= end; slot++) {  // the last is the step itself
      double score = 0;
      for (i64 i = 0; i < keys; i++) score += q(r, h, i) / 2 * (slot < end ? old[0](r, slot, h / 2, i) : k(r, h / 2, i));
      sum += std::exp(score), total += std::exp(score) * (slot < end ? old[1](r, slot, h / 2, j) : v(r, h / 2, j));
    }
    return total / sum;
  });
  for (int m : {0, 1})
    s.is(m ? "values" : "keys", *after[m], [&](i64 r, i64 slot, i64 g, i64 j) {
      const bool own = slot == (window ? slots - 1 : positions[r]);
      return own ? (m ? v : k)(r, g, j) : old[m](r, slot + (window > 0), g, j);
    });
}

void position_steps(i64 n, i64 turned) {
  i64 positions[2] = {1000, 3}, next[2] = {};
  Step s(named("rotate", {n, turned}), program::ROTATE, {2, 3, n});
  auto &y = s.result({2, 3, n}, 3, 2), &x = s.input({2, 3, n}, -1, 1, 3, 2);
  std::vector<double> speed;
  for (i64 i = 0; i < turned / 2; i++) speed.push_back(std::pow(100.0, -static_cast<double>(i) / static_cast<double>(turned)));
  s.operands.push_back({-1, reinterpret_cast<i64>(speed.data()), {}});
  s.i.shared = 0, s.i.number[0] = turned, s.i.number[1] = s.region(positions), s.run(0);
  s.is("y", y, [&](i64 r, i64 h, i64 d, i64) {
    const i64 half = turned / 2;
    if (d >= 2 * half) return x(r, h, d);
    const double angle = static_cast<double>(positions[r]) * speed[d % half], other = x(r, h, d < half ? d + half : d - half);
    return x(r, h, d) * std::cos(angle) + (d < half ? -other : other) * std::sin(angle);
  });
  Step a("advance", program::ADVANCE, {2});
  a.i.shared = 0, a.i.number[0] = a.region(positions), a.i.number[1] = a.region(next), a.run(0);
  a.c.compare("next", {static_cast<float>(next[0]), static_cast<float>(next[1])}, {1001, 4});
}

// W (silu(W x)) by three instructions that wait for each other, what is between them in a region.
void several(i64 n, i64 rows) {
  Case c(named("program", {n, rows}));
  Packed p(n, n, 0, true);
  Input x(rows * n);
  std::vector<float> workspace = blank(7 + 2 * rows * n), y = blank(rows * n);
  const Operand given = {-1, reinterpret_cast<i64>(x.data.data()), {n, 1}}, result = {2, 0, {n, 1}};
  const Operand first = {1, 7, {n, 1}}, second = {1, 7 + rows * n, {n, 1}};
  auto each = [&](Operand o) { return Operand{o.region, o.at, {0, 0, n, 1}}; };
  const Operand operands[] = {first, given, each(second), each(first), result, second};
  Instruction list[3] = {};
  list[0].op = list[2].op = program::PRODUCT, list[0].matrix = list[2].matrix = &p.m, list[0].shape[0] = list[2].shape[0] = rows;
  list[1].op = program::UNARY, list[1].number[0] = program::SILU;
  for (int k = 0; k < 4; k++) list[1].shape[k] = k < 2 ? 1 : k == 2 ? rows : n;
  for (int k = 0; k < 3; k++) list[k].shared = k != 1, list[k].wait = k > 0, list[k].operands = 2 * k;
  const Program program = {rows, 3, rows * in_groups(n), 2, list, operands};
  void* regions[] = {nullptr, workspace.data(), y.data()};
  bestiary_program(&program, regions);
  std::vector<double> wanted;
  for (i64 r = 0; r < rows; r++) {
    auto h = p.times({x.data.begin() + r * n, x.data.begin() + (r + 1) * n});
    for (double& v : h) v *= sigmoid(v);
    for (double v : p.times(h)) wanted.push_back(v);
  }
  c.compare("y", y, wanted);
}

void instructions() {
  for (i64 n : {1, 15, 16, 33, 150}) {
    for (i64 every : {1, 2}) elementwise(n, every);
    for (i64 rows : {1, 3, 9}) {
      for (i64 format = 0; format < 4; format++) products(n, rows, format);
      several(n, rows);
    }
    for (i64 inner : {1, 17})
      for (bool turned : {false, true}) batched(n, inner, turned);
    for (bool gated : {false, true}) {
      for (i64 taps : {1, 2, 4}) convolution_step(n, taps, gated);
      for (i64 states : {1, 16}) scan_step(n, states, gated);
    }
    for (i64 keys : {1, 19}) {
      for (i64 kind = 0; kind < 6; kind++)
        for (float strength : {0.1f, 50.0f}) {
          linear_step(keys, n, kind % 3, kind / 3, strength);
          delta_step(keys, n, kind % 3, kind / 3, strength);
        }
      for (i64 levels : {1, 2, 5})
        for (i64 past : {0, 1, 7, 100})
          for (bool same : {false, true}) fenwick_step(keys, n, levels, past, same);
      for (i64 window : {0, 1, 2, 70})
        for (i64 past : {0, 1, 69, 100}) attend_step(keys, n, window, past);
    }
    for (float size : {1.0f, 10.0f, 40.0f}) wkv_step(n, size);
    for (i64 turned : {n / 2 * 2, n / 4 * 2}) position_steps(n, turned);
  }
}

}  // namespace
