// Kernels that look at no more than a few steps: the short convolution, the norm, the cross-entropy.
#pragma once

#include "case.h"

namespace {

void short_convolution_layer(i64 batch, i64 time, i64 channels, i64 taps, bool activated, bool padded) {
  Case c(named("short convolution", {batch, time, channels, taps, activated, padded}));
  const i64 whole = batch * time * channels, history = batch * (taps - 1) * channels;
  const Lengths lengths(batch, time, padded);
  Input x(whole), weight(channels * taps), bias(channels), before(history), dy(whole), dafter(history);
  for (Input* p : {&x, &dy}) lengths.spoil(*p, channels);
  auto y = blank(whole), after = blank(history);
  Convolution v = {};
  v.batch = batch, v.time = time, v.channels = channels, v.taps = taps, v.silu = activated;
  v.x = x, v.weight = weight, v.bias = activated ? static_cast<const float*>(bias) : nullptr, v.before = before;
  v.x_batch = time * channels, v.x_time = channels, v.lengths = lengths.given(), v.y = y.data(), v.after = after.data();
  bestiary_convolution_forward(&v);

  // the input of step t of a row, steps before 0 being those of the history
  auto input = [&](i64 b, i64 t, i64 d) -> const Real& {
    return t < 0 ? before[(b * (taps - 1) + taps - 1 + t) * channels + d] : x[(b * time + t) * channels + d];
  };
  std::vector<Real> wanted_y(whole), last(history);
  for (i64 b = 0; b < batch; b++)
    for (i64 d = 0; d < channels; d++) {
      for (i64 t = 0; t < lengths.of[b]; t++) {
        Real sum = activated ? bias[d] : Real(0);
        for (i64 k = 0; k < taps; k++) sum += weight[d * taps + k] * input(b, t - taps + 1 + k, d);
        wanted_y[(b * time + t) * channels + d] = activated ? silu(sum) : sum;
      }
      for (i64 k = 0; k < taps - 1; k++)
        last[(b * (taps - 1) + k) * channels + d] = input(b, lengths.of[b] - taps + 1 + k, d);
    }
  c.output("y", y, wanted_y, &dy);
  c.output("after", after, last, &dafter);

  auto dx = blank(whole), dbefore = blank(history), dweight = blank(batch * taps * channels), dbias = blank(batch * channels);
  ConvolutionBack g = {};
  g.dy = dy, g.dafter = dafter, g.dy_batch = time * channels, g.dy_time = channels;
  g.dx = dx.data(), g.dbefore = dbefore.data(), g.dweight = dweight.data(), g.dbias = dbias.data();
  bestiary_convolution_backward(&v, &g);
  auto turned = dweight;  // (batch, taps, channels) to (batch, channels, taps)
  for (i64 b = 0; b < batch; b++)
    for (i64 k = 0; k < taps; k++)
      for (i64 d = 0; d < channels; d++) turned[(b * channels + d) * taps + k] = dweight[(b * taps + k) * channels + d];
  c.gradient("dx", dx, x);
  c.gradient("dbefore", dbefore, before);
  c.gradient("dweight", turned, weight);
  if (activated) c.gradient("dbias", dbias, bias);
}

// kind: no gate, one before the norm, one after; then the same without a weight.
void norm_of(i64 rows, i64 channels, i64 groups, int kind) {
  Case c(named("norm", {rows, channels, groups, kind}));
  const i64 many = rows * groups, whole = many * channels;
  const bool weighed = kind < 3, gated = kind % 3, first = kind % 3 == 1;
  Input x(whole), gate(whole, -3, 3), weight(groups * channels), dy(whole);
  auto y = blank(whole), scales = blank(many), dx = blank(whole), dgate = blank(gated ? whole : 0);
  auto dweight = blank(weighed ? bestiary_norm_parts(many, groups) * groups * channels : 0);
  Norm s = {};
  s.rows = many, s.channels = channels, s.groups = groups, s.first = first, s.eps = 0.01;
  s.x = x, s.x_row = s.gate_row = channels, s.y = y.data(), s.scales = scales.data();
  if (weighed) s.weight = weight;
  if (gated) s.gate = gate;
  bestiary_norm_forward(&s);

  std::vector<Real> wanted;
  for (i64 r = 0; r < many; r++) {
    std::vector<Real> h;
    Real squares;
    for (i64 i = 0; i < channels; i++) {
      h.push_back(first ? x[r * channels + i] * silu(gate[r * channels + i]) : x[r * channels + i]);
      squares += h[i] * h[i];
    }
    const Real root = root_of(squares / static_cast<double>(channels) + s.eps);
    for (i64 i = 0; i < channels; i++) {
      const Real v = weighed ? weight[r % groups * channels + i] * h[i] / root : h[i] / root;
      wanted.push_back(gated && !first ? v * silu(gate[r * channels + i]) : v);
    }
  }
  c.output("y", y, wanted, &dy);
  NormBack b = {};
  b.dy = dy, b.dy_row = channels, b.dx = dx.data(), b.dgate = dgate.data(), b.dweight = dweight.data();
  bestiary_norm_backward(&s, &b);
  c.gradient("dx", dx, x);
  if (gated) c.gradient("dgate", dgate, gate);
  if (weighed) c.gradient("dweight", dweight, weight);
}

void cross_entropy_of(i64 rows, i64 vocab, float size) {
  Case c(named("cross-entropy", {rows, vocab, static_cast<i64>(size)}));
  Input logits(rows * vocab, -size, size), weights(rows, 0, 1);
  std::vector<i64> targets(rows);
  for (i64 r = 0; r < rows; r++) targets[r] = r % 4 == 3 ? -1 : r * 7 % vocab;
  auto found = logits.data, nats = blank(rows);
  CrossEntropy s = {};
  s.rows = rows, s.vocab = s.row = vocab, s.gradient = 1, s.logits = found.data(), s.targets = targets.data();
  s.weights = weights, s.nats = nats.data();
  bestiary_cross_entropy(&s);

  std::vector<Real> wanted;
  for (i64 r = 0; r < rows; r++) {
    Real sum;
    for (i64 i = 0; i < vocab; i++) sum += exp(logits[r * vocab + i]);
    wanted.push_back(targets[r] < 0 ? Real(0) : log(sum) - logits[r * vocab + targets[r]]);
  }
  c.output("nats", nats, wanted, &weights);
  c.gradient("gradient", found, logits);
}

}  // namespace
