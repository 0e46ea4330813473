// Matrices in panels.
#pragma once

#include "case.h"

namespace {

// A matrix packed in a format, and the weights that it then has.
struct Packed {
  Matrix m = {};
  Input weight, bias;
  std::vector<char> data;
  std::vector<float> scales, kept;

  Packed(i64 outputs, i64 inputs, i64 format, bool with_bias)
      : weight(outputs * inputs, -1 / std::sqrt(static_cast<float>(inputs)), 1 / std::sqrt(static_cast<float>(inputs))),
        bias(outputs) {
    data.resize(bestiary_pack_bytes(format, outputs, inputs));
    scales.resize((outputs + 15) / 16 * 16);
    m.outputs = outputs, m.inputs = inputs, m.format = format, m.data = data.data(), m.scales = scales.data();
    if (with_bias) m.bias = bias;
    bestiary_pack(&m, weight, data.data(), scales.data());
    kept = blank(outputs * inputs);
    bestiary_unpack(&m, 0, outputs, kept.data());
  }
  // Packed weights are as near as their format allows: the largest weight that shares a scale says how near.
  bool near() const {
    const i64 shared = m.format == 3 ? 32 : m.inputs;
    for (i64 n = 0; n < m.outputs; n++)
      for (i64 k0 = 0; k0 < m.inputs; k0 += shared) {
        double most = 0;
        const i64 end = k0 + shared < m.inputs ? k0 + shared : m.inputs;
        for (i64 k = k0; k < end; k++) most = larger_size(most, weight.data[n * m.inputs + k]);
        for (i64 k = k0; k < end; k++) {
          const double w = weight.data[n * m.inputs + k], off = std::fabs(kept[n * m.inputs + k] - w);
          // int4 reaches from -8 to 7 scales, and the scale is rounded to bf16, by a 256th at most
          const double least[] = {0, std::fabs(w) / 256, most / 254 * 1.0001, most / 16 * 1.0001 + most / 256};
          const bool cut = m.format == 3 && std::fabs(kept[n * m.inputs + k]) > 6.9 * most / 8;
          if (!(off <= (cut ? most / 8 * (1 + 7.001 / 256) : least[m.format]))) return false;
        }
      }
    return true;
  }
  // The product with a row of numbers.
  std::vector<double> times(const std::vector<double>& x) const {
    std::vector<double> y;
    for (i64 n = 0; n < m.outputs; n++) {
      y.push_back(m.bias ? m.bias[n] : 0);
      for (i64 k = 0; k < m.inputs; k++) y[n] += x[k] * kept[n * m.inputs + k];
    }
    return y;
  }
};

void product(i64 outputs, i64 inputs, i64 format, i64 rows) {
  Case c(named("matvec", {outputs, inputs, format, rows}));
  Packed p(outputs, inputs, format, rows & 1);
  Input x(rows * inputs);
  auto y = blank(rows * outputs);
  bestiary_multiply(&p.m, rows, x, inputs, y.data(), outputs);
  std::vector<double> wanted;
  for (i64 r = 0; r < rows; r++)
    for (double v : p.times({x.data.begin() + r * inputs, x.data.begin() + (r + 1) * inputs})) wanted.push_back(v);
  c.compare("y", y, wanted);
  const i64 which[] = {outputs - 1, 0, outputs / 2};
  auto rows_of = blank(3 * inputs);
  bestiary_gather(&p.m, 3, which, rows_of.data());
  std::vector<double> same;
  for (i64 r : which) same.insert(same.end(), p.kept.begin() + r * inputs, p.kept.begin() + (r + 1) * inputs);
  c.compare("rows", rows_of, same);
  compared++;
  if (!p.near()) wrong++, std::printf("%s: packed weights are off\n", c.name.c_str());
}

}  // namespace
