// Numbers in double precision that know what they were computed from: an equation that is written with them has its
// gradients by the chain rule.
#pragma once

#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace {

// A value, and where on the tape it stands; constants stand nowhere.
struct Real {
  double value = 0;
  std::ptrdiff_t place = -1;
  Real() = default;
  Real(double value) : value(value) {}
};

// What an operation had for its one or two operands, and its slopes.
struct Operation {
  std::ptrdiff_t a, b;
  double slope_a, slope_b;
};

std::vector<Operation> tape;

Real recorded(double value, Operation how) {
  Real x(value);
  x.place = static_cast<std::ptrdiff_t>(tape.size());
  tape.push_back(how);
  return x;
}
Real made(double value, const Real& a, double slope_a, const Real& b = 0, double slope_b = 0) {
  if (a.place < 0 && b.place < 0) return value;
  return recorded(value, {a.place, b.place, slope_a, slope_b});
}

// A number to be differentiated by.
Real variable(double value) { return recorded(value, {-1, -1, 0, 0}); }

Real operator+(Real a, Real b) { return made(a.value + b.value, a, 1, b, 1); }
Real operator-(Real a, Real b) { return made(a.value - b.value, a, 1, b, -1); }
Real operator*(Real a, Real b) { return made(a.value * b.value, a, b.value, b, a.value); }
Real operator/(Real a, Real b) { return made(a.value / b.value, a, 1 / b.value, b, -a.value / b.value / b.value); }
Real& operator+=(Real& a, Real b) { return a = a + b; }

double sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }

Real exp(Real x) {
  const double e = std::exp(x.value);
  return made(e, x, e);
}
Real log(Real x) { return made(std::log(x.value), x, 1 / x.value); }
Real root_of(Real x) {
  const double root = std::sqrt(x.value);
  return made(root, x, 0.5 / root);
}
Real softplus(Real x) { return made(softplus(x.value), x, sigmoid(x.value)); }
Real silu(Real x) {
  const double s = sigmoid(x.value);
  return made(x.value * s, x, s * (1 + x.value * (1 - s)));
}

// The gradient of a number by everything on the tape.
std::vector<double> gradients(const Real& of) {
  std::vector<double> g(tape.size());
  if (of.place >= 0) g[of.place] = 1;
  for (auto i = of.place; i >= 0; i--) {
    const Operation& o = tape[i];
    if (o.a >= 0) g[o.a] += g[i] * o.slope_a;
    if (o.b >= 0) g[o.b] += g[i] * o.slope_b;
  }
  return g;
}

// A number's gradient is the sum of what comes from wherever it, or a function of it alone, is used: how large these terms
// are, without their signs.
std::vector<double> sizes_of_terms(const std::vector<double>& gradients) {
  std::vector<double> sizes(gradients.size());
  for (size_t i = gradients.size(); i--;) {
    const Operation& o = tape[i];
    const double own = std::fabs(gradients[i]), size = (o.a < 0 || o.b < 0) && sizes[i] > own ? sizes[i] : own;
    if (o.a >= 0) sizes[o.a] += size * std::fabs(o.slope_a);
    if (o.b >= 0) sizes[o.b] += size * std::fabs(o.slope_b);
  }
  return sizes;
}

}  // namespace
