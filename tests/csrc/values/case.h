// What a comparison consists of: inputs that are drawn, a kernel's results, and what they should be.
#pragma once

#include <cstdio>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/kernels.cpp"
#include "tape.h"

namespace {

constexpr double WITHIN = 2e-6;
constexpr double ROUNDED = 1e-6;  // of the terms of a sum
const float NaN = std::numeric_limits<float>::quiet_NaN();
std::mt19937 generator;
int compared = 0, wrong = 0;

// A number between the two: the same on every platform, unlike those that the standard library draws.
float drawn(float low, float high) { return low + (high - low) * static_cast<float>(generator() >> 8) / (1 << 24); }

// What a kernel reads, and the same as numbers on the tape.
struct Input {
  std::vector<float> data;
  std::vector<Real> real;

  explicit Input(i64 count, float low = -1, float high = 1) : data(count), real(count) {
    for (i64 i = 0; i < count; i++) real[i] = variable(data[i] = drawn(low, high));
  }
  explicit Input(const std::vector<float>& values) : data(values) {
    for (float x : data) real.push_back(variable(x));
  }
  operator const float*() const { return data.data(); }
  const Real& operator[](i64 i) const { return real[i]; }
};

// The larger size; GCC 12 for ARM stumbles over loops with fmax.
double larger_size(double a, double b) { return std::fabs(b) > a ? std::fabs(b) : a; }

// A tensor that a kernel writes: what it leaves out stays NaN.
std::vector<float> blank(i64 count) { return std::vector<float>(count, NaN); }

// A row's real steps: all, or fewer in every row but the last.
struct Lengths {
  std::vector<i64> of;
  bool padded;

  Lengths(i64 batch, i64 time, bool padded) : of(batch, time), padded(padded) {
    if (padded)
      for (i64 b = 0; b + 1 < batch; b++) of[b] = b * 5 % (time + 1);
  }
  const i64* given() const { return padded ? of.data() : nullptr; }
  // NaN where a tensor (batch, time, width) holds padding.
  void spoil(Input& x, i64 width) const {
    const i64 time = static_cast<i64>(x.data.size() / (of.size() * width));
    for (size_t b = 0; b < of.size(); b++)
      for (i64 i = (b * time + of[b]) * width; i < static_cast<i64>(b + 1) * time * width; i++) x.data[i] = NaN;
  }
};

// A call of a kernel with its inputs: compares what it gave with what it should give. Its name says what is drawn, so that
// no case depends on those before it.
struct Case {
  std::string name;
  Real loss;  // outputs weighed by their gradients
  std::vector<double> by, size_by;

  explicit Case(std::string name) : name(std::move(name)) {
    std::seed_seq seeds(this->name.begin(), this->name.end());
    generator.seed(seeds);
  }
  ~Case() { tape.clear(); }

  // sizes: of the terms that are summed, where a number is a sum and they are known: they may cancel, and each is rounded.
  void compare(const char* what, const std::vector<float>& found, const std::vector<double>& wanted,
               const std::vector<double>& sizes = {}) {
    double most = 0.5, off = 0;
    for (double x : wanted) most = larger_size(most, x);
    for (size_t i = 0; i < wanted.size() && i < found.size(); i++) {
      const double here = std::fabs(found[i] - wanted[i]), allowed = sizes.empty() ? 0 : ROUNDED * sizes[i];
      if (here <= allowed || (wanted[i] != wanted[i] && found[i] != found[i])) continue;
      off = here <= off ? off : here;  // NaN, too
    }
    compared++;
    if (found.size() == wanted.size() && off <= WITHIN * most) return;
    wrong++;
    std::printf("%s: %s is off by %g of %g\n", name.c_str(), what, off, most);
  }
  // An output, and the gradient that flows into it (none: null).
  void output(const char* what, const std::vector<float>& found, const std::vector<Real>& wanted, const Input* gradient) {
    std::vector<double> values;
    for (size_t i = 0; i < wanted.size(); i++) {
      values.push_back(wanted[i].value);
      if (gradient && wanted[i].place >= 0) loss += wanted[i] * static_cast<double>(gradient->data[i]);
    }
    compare(what, found, values);
  }
  // The gradient of an input, once all outputs are known. It may come in equal parts, to be summed.
  void gradient(const char* what, const std::vector<float>& found, const Input& of) {
    if (by.empty()) by = gradients(loss), size_by = sizes_of_terms(by);
    std::vector<double> wanted, sizes;
    for (const Real& x : of.real) {
      const bool known = x.place < static_cast<i64>(by.size());
      wanted.push_back(known ? by[x.place] : 0), sizes.push_back(known ? size_by[x.place] : 0);
    }
    std::vector<float> summed(wanted.size());
    for (size_t i = 0; i < wanted.size(); i++) {
      double sum = 0;
      for (size_t j = i; j < found.size(); j += wanted.size()) sum += found[j];
      summed[i] = static_cast<float>(sum);
    }
    compare(what, summed, wanted, sizes);
  }
};

std::string named(const char* kernel, std::initializer_list<i64> sizes) {
  std::string name = kernel;
  for (i64 size : sizes) name.append(" ").append(std::to_string(size));
  return name;
}

}  // namespace
