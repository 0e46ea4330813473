// Every kernel against its equation, written here once more in double precision and step by step: outputs, states and
// gradients within 2e-6 of the largest number of each, or of 1/2 where all are smaller; where a gradient is a sum whose terms
// cancel, within 1e-6 of their sizes. What lies in padding is NaN.
//
// It needs no Python, so it also runs where there is a cross compiler and an emulator alone. One more kernel is one more
// function here: it draws its inputs (Input), calls the kernel, writes the equation in Real, and compares (Case).
#include "values/case.h"
#include "values/layers.h"
#include "values/products.h"
#include "values/program.h"
#include "values/recurrences.h"

namespace {

// The functions that gates are made of, to a few last places, and where they have none.
void gates() {
  const int most[] = {2, 3, 3, 4, 2};
  const char* names[] = {"exp", "sigmoid", "softplus", "silu", "exp2"};
  const float infinite = std::numeric_limits<float>::infinity();
  std::vector<float> x, y(W);
  for (int i = 0; i < 1 << 16; i++) x.push_back(-87 + 175.0f * i / (1 << 16)), x.push_back(-1 + 2.0f * i / (1 << 16));
  for (int i = 0; i < W; i++) x.push_back(0);
  y.resize(x.size() / W * W);
  for (int which = 0; which < 5; which++) {
    bestiary_elementwise(static_cast<i64>(y.size()), which, x.data(), y.data());
    double off = 0;
    for (size_t i = 0; i < y.size(); i++) {
      const double v = x[i], s = sigmoid(v);
      const double wanted = which == 0 ? std::exp(v) : which == 1 ? s : which == 2 ? softplus(v) : which == 3 ? v * s : std::exp2(v);
      const float size = std::fmax(static_cast<float>(std::fabs(wanted)), 1.2e-38f);
      const double here = std::fabs(y[i] - wanted) / (std::nextafter(size, infinite) - size);
      off = here <= off ? off : here;
    }
    compared++;
    if (!(off <= most[which])) wrong++, std::printf("%s is off by %g last places\n", names[which], off);
    std::vector<float> odd(W, NaN), found(W);
    const float ends[] = {infinite, -infinite}, wanted[5][2] = {{infinite, 0}, {1, 0}, {infinite, 0}, {infinite, NaN}, {infinite, 0}};
    bestiary_elementwise(W, which, odd.data(), found.data());
    compared++;
    if (found[0] == found[0]) wrong++, std::printf("%s loses NaN\n", names[which]);
    for (int i = 0; i < 2; i++) {
      std::fill(odd.begin(), odd.end(), ends[i]);
      bestiary_elementwise(W, which, odd.data(), found.data());
      compared++;
      const float w = wanted[which][i];
      if (found[W - 1] != w && !(w != w && found[W - 1] != found[W - 1]))
        wrong++, std::printf("%s(%g) is %g\n", names[which], ends[i], found[W - 1]);
    }
  }
}

}  // namespace

int main() {
  gates();
  instructions();
  for (i64 batch : {1, 3})
    for (i64 time : {0, 1, 2, 5, 70})
      for (i64 channels : {1, 7, 16, 35})
        for (bool padded : {false, true}) {
          linear_recurrence_of(batch, time, channels, padded);
          for (i64 taps : {1, 2, 4, 16})
            for (bool activated : {false, true})
              short_convolution_layer(batch, time, channels, taps, activated, padded);
        }
  for (i64 format = 0; format < 4; format++)
    for (i64 rows : {1, 2, 3, 5, 8, 17}) {
      for (i64 outputs : {1, 15, 16, 17, 50})
        for (i64 inputs : {1, 2, 31, 32, 33, 300})
          if (format != 1 || rows < 16 || !bestiary_rounds_inputs()) product(outputs, inputs, format, rows);
    }
  for (i64 batch : {1, 3})
    for (i64 time : {0, 1, 2, 33, 70})
      for (i64 channels : {1, 7, 35})
        for (i64 states : {1, 7, 16})
          for (int kind = 0; kind < 4; kind++)
            for (float strength : {1.0f, 50.0f}) selective_scan(batch, time, channels, states, kind & 1, kind & 2, strength);
  for (bool padded : {false, true}) selective_scan(2, 40, 150, 19, true, padded, 3);  // several blocks in each group
  for (i64 batch : {1, 3})
    for (i64 time : {0, 1, 2, 3, 40})
      for (i64 channels : {1, 7, 35, 70})
        for (bool padded : {false, true}) {
          for (float size : {1.0f, 10.0f, 40.0f})
            for (float decay : {0.1f, 1.0f, 50.0f}) wkv_of(batch, time, channels, size, decay, 0, padded);
          for (float bonus : {-90.0f, -25.0f, 25.0f, 90.0f}) wkv_of(batch, time, channels, 3, 1, bonus, padded);
        }
  for (int kind = 0; kind < 12; kind++)
    for (float strength : {0.1f, 3.0f, 50.0f}) {
      const i64 decay = kind % 3;
      const bool bonus = kind / 3 & 1, ones = kind / 6;
      if (!decay && strength > 1) continue;
      for (i64 time : {0, 1, 2, 3, 66}) {
        linear_attention_of(2, time, 1, 1, 5, 20, decay, bonus, ones, strength);
        linear_attention_of(1, time, 2, 2, 3, 7, decay, bonus, ones, strength);
      }
      linear_attention_of(1, 1, 1, 1, 1, 1, decay, bonus, ones, strength);
      for (i64 time : {1, 3}) linear_attention_of(1, time, 1, 9, 18, 113, decay, bonus, ones, strength);
    }
  for (int kind = 0; kind < 4; kind++)
    for (float strength : {0.1f, 3.0f, 50.0f}) {
      if (!kind && strength > 1) continue;
      for (i64 time : {0, 1, 2, 3, 40}) {
        delta_rule_of(2, time, 1, 5, 20, kind, strength);
        delta_rule_of(1, time, 2, 17, 7, kind, strength);
      }
      delta_rule_of(1, 1, 1, 1, 1, kind, strength);
      for (i64 values : {33, 50, 129}) delta_rule_of(1, 3, 2, 3, values, kind, strength);  // 1, 2, 3 and 4 vectors; several panels
      delta_rule_of(1, 20, 1, 260, 16, kind, strength);  // shorter chunks
    }
  for (i64 rows : {1, 3, 65})
    for (i64 channels : {2, 16, 35, 130})
      for (i64 groups : {1, 3})
        for (int kind = 0; kind < 6; kind++) norm_of(rows, channels, groups, kind);
  for (i64 rows : {1, 5})
    for (i64 vocab : {1, 16, 63, 65, 1000})
      for (float size : {1.0f, 30.0f}) cross_entropy_of(rows, vocab, size);
  std::printf("%d compared, %d wrong, %d lanes\n", compared, wrong, static_cast<int>(bestiary_lanes()));
  return wrong != 0;
}
