// Every kernel against its equation, written here once more in double precision and step by step: outputs, states and
// gradients within 2e-6 of the largest number of each, or of 1/2 where all are smaller. What lies in padding is NaN.
//
// It needs no Python, so it also runs where there is a cross compiler and an emulator alone. One more kernel is one more
// function here: it draws its inputs (Input), calls the kernel, writes the equation in Real, and compares (Case).
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/kernels.cpp"
#include "tape.h"

namespace {

constexpr double WITHIN = 2e-6;
const float NaN = std::numeric_limits<float>::quiet_NaN();
std::mt19937 generator(1);
int compared = 0, wrong = 0;

// What a kernel reads, and the same as numbers on the tape.
struct Input {
  std::vector<float> data;
  std::vector<Real> real;

  explicit Input(i64 count, float low = -1, float high = 1) : data(count), real(count) {
    std::uniform_real_distribution<float> draw(low, high);
    for (i64 i = 0; i < count; i++) real[i] = variable(data[i] = draw(generator));
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

// A call of a kernel with its inputs: compares what it gave with what it should give.
struct Case {
  std::string name;
  Real loss;  // outputs weighed by their gradients
  std::vector<double> by;

  explicit Case(std::string name) : name(std::move(name)) {}
  ~Case() { tape.clear(); }

  void compare(const char* what, const std::vector<float>& found, const std::vector<double>& wanted) {
    double most = 0.5, off = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
      most = larger_size(most, wanted[i]);
      const double here = std::fabs(found[i] - wanted[i]);
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
    if (by.empty()) by = gradients(loss);
    std::vector<double> wanted;
    for (const Real& x : of.real) wanted.push_back(x.place < static_cast<i64>(by.size()) ? by[x.place] : 0);
    std::vector<float> summed(wanted.size());
    for (size_t i = 0; i < wanted.size(); i++) {
      double sum = 0;
      for (size_t j = i; j < found.size(); j += wanted.size()) sum += found[j];
      summed[i] = static_cast<float>(sum);
    }
    compare(what, summed, wanted);
  }
};

std::string named(const char* kernel, std::initializer_list<i64> sizes) {
  std::string name = kernel;
  for (i64 size : sizes) name.append(" ").append(std::to_string(size));
  return name;
}

// gated: softplus, D, bias and z; padded: lengths and gaps; strength: the fastest decay, -log a step.
void selective_scan(i64 batch, i64 time, i64 channels, i64 states, bool gated, bool padded, float strength) {
  Case c(named("selective scan", {batch, time, channels, states, gated, padded, static_cast<i64>(strength)}));
  const i64 whole = batch * time * channels, parts = batch * time * states, state = batch * channels * states;
  const Lengths lengths(batch, time, padded);
  Input u(whole), dt(whole, gated ? -2 : 0, 1), A(channels * states, -strength, -0.1f), B(parts), C(parts), D(channels);
  Input bias(channels), z(whole), gaps(batch * time, 0, 2), before(state), dy(whole), dafter(state);
  for (Input* x : {&u, &dt, &z, &dy}) lengths.spoil(*x, channels);
  for (Input* x : {&B, &C}) lengths.spoil(*x, states);
  lengths.spoil(gaps, 1);
  auto y = blank(whole), after = blank(state), starts = blank(bestiary_scan_starts(batch, time, channels, states));
  Scan s = {};
  s.batch = batch, s.time = time, s.channels = channels, s.states = states, s.softplus = gated;
  s.u = u, s.dt = dt, s.A = A, s.B = B, s.C = C, s.before = before, s.lengths = lengths.given();
  if (gated) s.D = D, s.bias = bias, s.z = z;
  if (padded) s.gaps = gaps;
  s.u_batch = s.dt_batch = s.z_batch = time * channels, s.u_time = s.dt_time = s.z_time = channels;
  s.b_batch = s.c_batch = time * states, s.b_time = s.c_time = states;
  s.y = y.data(), s.after = after.data(), s.starts = starts.data();
  bestiary_scan_forward(&s);

  std::vector<Real> wanted_y(whole), h = before.real;
  for (i64 b = 0; b < batch; b++)
    for (i64 t = 0; t < lengths.of[b]; t++)
      for (i64 d = 0; d < channels; d++) {
        const i64 at = (b * time + t) * channels + d, row = (b * time + t) * states;
        Real step = gated ? softplus(dt[at] + bias[d]) : dt[at], sum = gated ? D[d] * u[at] : Real(0);
        if (padded) step = step * gaps[b * time + t];
        for (i64 n = 0; n < states; n++) {
          Real& held = h[(b * channels + d) * states + n];
          held = exp(step * A[d * states + n]) * held + step * B[row + n] * u[at];
          sum += C[row + n] * held;
        }
        wanted_y[at] = gated ? sum * silu(z[at]) : sum;
      }
  c.output("y", y, wanted_y, &dy);
  c.output("after", after, h, &dafter);

  const i64 groups = bestiary_scan_groups(channels);
  auto du = blank(whole), ddt = blank(whole), dz = blank(whole), dB = blank(groups * parts), dC = dB, dA = blank(state);
  auto dD = blank(batch * channels), dbias = dD, dbefore = dA;
  ScanBack r = {};
  r.dy = dy, r.dafter = dafter, r.dy_batch = time * channels, r.dy_time = channels;
  r.du = du.data(), r.ddt = ddt.data(), r.dz = gated ? dz.data() : nullptr, r.dB = dB.data(), r.dC = dC.data();
  r.dA = dA.data(), r.dD = dD.data(), r.dbias = dbias.data(), r.dbefore = dbefore.data();
  bestiary_scan_backward(&s, &r);
  c.gradient("du", du, u);
  c.gradient("ddt", ddt, dt);
  c.gradient("dA", dA, A);
  c.gradient("dB", dB, B);
  c.gradient("dC", dC, C);
  c.gradient("dbefore", dbefore, before);
  if (!gated) return;
  c.gradient("dz", dz, z);
  c.gradient("dD", dD, D);
  c.gradient("dbias", dbias, bias);
}

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

void linear_recurrence_of(i64 batch, i64 time, i64 channels, bool padded) {
  Case c(named("linear recurrence", {batch, time, channels, padded}));
  const i64 whole = batch * time * channels, row = time * channels, state = batch * channels;
  const Lengths lengths(batch, time, padded);
  Input a(whole), b_(whole), before(state), dh(whole), dafter(state);
  for (Input* p : {&a, &b_, &dh}) lengths.spoil(*p, channels);
  auto h = blank(whole), after = blank(state), da = blank(whole), db = blank(whole), dbefore = blank(state);
  Recurrence r = {};
  r.batch = batch, r.time = time, r.channels = channels, r.a = a, r.b = b_, r.before = before;
  r.a_batch = r.b_batch = row, r.a_time = r.b_time = channels, r.lengths = lengths.given();
  r.h = h.data(), r.after = after.data();
  bestiary_recurrence_forward(&r);

  std::vector<Real> wanted(whole), held = before.real;
  for (i64 b = 0; b < batch; b++)
    for (i64 t = 0; t < lengths.of[b]; t++)
      for (i64 d = 0; d < channels; d++) {
        const i64 at = (b * time + t) * channels + d;
        Real& now = held[b * channels + d];
        wanted[at] = now = a[at] * now + b_[at];
      }
  c.output("h", h, wanted, &dh);
  c.output("after", after, held, &dafter);

  RecurrenceBack g = {};
  g.dh = dh, g.dafter = dafter, g.dh_batch = row, g.dh_time = channels;
  g.da = da.data(), g.db = db.data(), g.dbefore = dbefore.data();
  bestiary_recurrence_backward(&r, &g);
  c.gradient("da", da, a);
  c.gradient("db", db, b_);
  c.gradient("dbefore", dbefore, before);
}

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
          // int4 reaches from -8 to 7 scales, and the scale is rounded to bf16
          const double least[] = {0, std::fabs(w) / 256, most / 254 * 1.0001, most / 16 * 1.0001 + most / 256};
          const bool cut = m.format == 3 && std::fabs(kept[n * m.inputs + k]) > 6.9 * most / 8;
          if (!(off <= (cut ? most / 8 * 1.02 : least[m.format]))) return false;
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
  compared++;
  if (!p.near()) wrong++, std::printf("%s: packed weights are off\n", c.name.c_str());
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
