// The cross-entropy of rows of logits, and its gradient, which takes their place.
//
//   nats = log(sum_j exp(x_j)) - x_target;   x_j becomes weight (exp(x_j) / sum - [j = target])
//
// A row stays in the second-level cache for its three passes: the largest logit, the sum, the gradient.
#pragma once

#include <cmath>

#include "parallel.h"

extern "C" {
struct CrossEntropy {
  i64 rows, vocab, row, gradient;  // row: from one to the next; gradient: whether the logits become it
  float* logits;
  const i64* targets;    // below vocab; a row whose target is below 0 has no nats and no gradient
  const float* weights;  // (rows), of the gradient; null for ones
  float* nats;           // (rows)
};
}

namespace cross_entropy {

constexpr i64 N = 4;  // sums side by side: each is a shorter one

inline void row(const CrossEntropy& s, i64 r) {
  float* x = s.logits + r * s.row;
  const i64 target = s.targets[r], whole = s.vocab / (N * W) * (N * W);
  if (target < 0) {
    s.nats[r] = 0;
    if (s.gradient) std::memset(x, 0, 4 * s.vocab);
    return;
  }
  vf tops[N];
  for (vf& top : tops) top = all(x[0]);
  for (i64 i = 0; i < whole; i += N * W)
    for (i64 k = 0; k < N; k++) tops[k] = larger(load(x + i + k * W), tops[k]);
  float most = x[0];
  for (const vf& top : tops) {
    float lanes[W];
    store(lanes, top);
    for (float v : lanes) most = v > most ? v : most;
  }
  for (i64 i = whole; i < s.vocab; i++) most = x[i] > most ? x[i] : most;
  const double apart = static_cast<double>(most) - x[target];
  vf sums[N] = {};
  for (i64 i = 0; i < whole; i += N * W)
    for (i64 k = 0; k < N; k++) {
      const vf e = exp(load(x + i + k * W) - most);
      sums[k] += e;
      if (s.gradient) store(x + i + k * W, e);
    }
  double total = 0;
  for (i64 i = whole; i < s.vocab; i += W) {
    const int n = static_cast<int>(s.vocab - i < W ? s.vocab - i : W);
    float lanes[W];
    const vf e = exp(load(x + i, n) - most);
    store(lanes, e);
    for (int lane = 0; lane < n; lane++) total += lanes[lane];
    if (s.gradient) store(x + i, e, n);
  }
  for (const vf& part : sums) total += sum(part);
  s.nats[r] = static_cast<float>(apart + std::log(total));
  if (!s.gradient) return;
  const float weight = s.weights ? s.weights[r] : 1.0f, factor = static_cast<float>(weight / total);
  for (i64 i = 0; i < whole; i += W) store(x + i, load(x + i) * factor);
  for (i64 i = whole; i < s.vocab; i++) x[i] *= factor;
  x[target] -= weight;
}

void run(const CrossEntropy& s) {
  parallel(s.rows, 16 * s.rows * s.vocab, 0, [&](float*, i64 r) { row(s, r); });
}

}  // namespace cross_entropy
