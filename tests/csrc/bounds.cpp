// Every kernel over many shapes, on buffers of exactly the size that they need: built with the sanitizers, it stops at the
// first access outside, and at undefined behaviour.
#include <cstdio>
#include <initializer_list>
#include <random>
#include <vector>

#include "../../csrc/kernels.cpp"

namespace {

std::mt19937 generator(1);

// A block of memory of its own, filled with random numbers.
std::vector<float>* numbers(i64 count, float low = -1, float high = 1) {
  auto* v = new std::vector<float>(count);
  std::uniform_real_distribution<float> draw(low, high);
  for (float& x : *v) x = draw(generator);
  v->shrink_to_fit();
  return v;
}

struct Pool {
  std::vector<std::vector<float>*> held;
  float* get(i64 count, float low = -1, float high = 1) {
    held.push_back(numbers(count, low, high));
    return held.back()->data();
  }
  ~Pool() {
    for (auto* v : held) delete v;
  }
};

void selective_scan(i64 batch, i64 time, i64 channels, i64 states, bool gated, bool padded) {
  Pool pool;
  const i64 whole = batch * time * channels, parts = batch * time * states;
  std::vector<i64> lengths(batch);
  for (i64 b = 0; b < batch; b++) lengths[b] = b % (time + 1);
  Scan s = {};
  s.batch = batch, s.time = time, s.channels = channels, s.states = states, s.softplus = gated;
  s.u = pool.get(whole), s.dt = pool.get(whole), s.A = pool.get(channels * states, -3, -0.1f);
  s.B = pool.get(parts), s.C = pool.get(parts), s.D = gated ? pool.get(channels) : nullptr;
  s.bias = gated ? pool.get(channels) : nullptr, s.z = gated ? pool.get(whole) : nullptr;
  s.gaps = padded ? pool.get(batch * time, 0, 2) : nullptr;
  s.u_batch = s.dt_batch = s.z_batch = time * channels, s.u_time = s.dt_time = s.z_time = channels;
  s.b_batch = s.c_batch = time * states, s.b_time = s.c_time = states;
  s.lengths = padded ? lengths.data() : nullptr;
  s.before = padded ? nullptr : pool.get(batch * channels * states);
  s.y = pool.get(whole), s.after = pool.get(batch * channels * states);
  bestiary_scan_forward(&s);  // saves nothing
  s.starts = pool.get(bestiary_scan_starts(batch, time, channels, states));
  bestiary_scan_forward(&s);
  ScanBack r = {};
  const i64 groups = bestiary_scan_groups(channels);
  r.dy = pool.get(whole), r.dafter = padded ? nullptr : pool.get(batch * channels * states);
  r.dy_batch = time * channels, r.dy_time = channels;
  r.du = pool.get(whole), r.ddt = pool.get(whole), r.dz = gated ? pool.get(whole) : nullptr;
  r.dB = pool.get(groups * parts), r.dC = pool.get(groups * parts);
  r.dA = pool.get(batch * channels * states), r.dD = pool.get(batch * channels), r.dbias = pool.get(batch * channels);
  r.dbefore = pool.get(batch * channels * states);
  bestiary_scan_backward(&s, &r);
}

void short_convolution_layers(i64 batch, i64 time, i64 channels, i64 taps, bool silu, bool padded) {
  Pool pool;
  std::vector<i64> lengths(batch);
  for (i64 b = 0; b < batch; b++) lengths[b] = b % (time + 1);
  const i64 whole = batch * time * channels, history = batch * (taps - 1) * channels;
  Convolution c = {};
  c.batch = batch, c.time = time, c.channels = channels, c.taps = taps, c.silu = silu;
  c.x = pool.get(whole), c.weight = pool.get(channels * taps), c.bias = silu ? pool.get(channels) : nullptr;
  c.before = pool.get(history), c.x_batch = time * channels, c.x_time = channels;
  c.lengths = padded ? lengths.data() : nullptr, c.y = pool.get(whole), c.after = pool.get(history);
  bestiary_convolution_forward(&c);
  ConvolutionBack g = {};
  g.dy = pool.get(whole), g.dafter = padded ? nullptr : pool.get(history);
  g.dy_batch = time * channels, g.dy_time = channels, g.dx = pool.get(whole), g.dbefore = pool.get(history);
  g.dweight = pool.get(batch * taps * channels), g.dbias = pool.get(batch * channels);
  bestiary_convolution_backward(&c, &g);
}

void recurrences(i64 batch, i64 time, i64 channels, bool padded) {
  Pool pool;
  std::vector<i64> lengths(batch);
  for (i64 b = 0; b < batch; b++) lengths[b] = b % (time + 1);
  const i64 whole = batch * time * channels, row = time * channels;
  Recurrence r = {};
  r.batch = batch, r.time = time, r.channels = channels;
  r.a = pool.get(whole), r.b = pool.get(whole), r.before = pool.get(batch * channels);
  r.a_batch = r.b_batch = row, r.a_time = r.b_time = channels, r.lengths = padded ? lengths.data() : nullptr;
  r.h = pool.get(whole), r.after = pool.get(batch * channels);
  bestiary_recurrence_forward(&r);
  RecurrenceBack g = {};
  g.dh = pool.get(whole), g.dafter = pool.get(batch * channels), g.dh_batch = row, g.dh_time = channels;
  g.da = pool.get(whole), g.db = pool.get(whole), g.dbefore = pool.get(batch * channels);
  bestiary_recurrence_backward(&r, &g);
}

void wkv_sums(i64 batch, i64 time, i64 channels, float size, bool padded) {
  Pool pool;
  std::vector<i64> lengths(batch);
  for (i64 b = 0; b < batch; b++) lengths[b] = b % (time + 1);
  const i64 whole = batch * time * channels, edge = batch * channels;
  Wkv s = {};
  s.batch = batch, s.time = time, s.channels = channels;
  s.k = pool.get(whole, -size, size), s.v = pool.get(whole), s.w = pool.get(channels, -size, 0), s.u = pool.get(channels);
  s.num = pool.get(edge), s.den = pool.get(edge, 0, 1), s.max = pool.get(edge, -size, size);
  s.k_batch = s.v_batch = time * channels, s.k_time = s.v_time = channels, s.lengths = padded ? lengths.data() : nullptr;
  s.y = pool.get(whole), s.new_num = pool.get(edge), s.new_den = pool.get(edge), s.new_max = pool.get(edge);
  bestiary_wkv_forward(&s);  // saves nothing
  s.starts = pool.get(batch * ((time + bestiary_wkv_chunk() - 1) / bestiary_wkv_chunk()) * 3 * channels);
  bestiary_wkv_forward(&s);
  WkvBack g = {};
  g.dy = pool.get(whole), g.dnew_num = pool.get(edge), g.dnew_den = pool.get(edge), g.dnew_max = pool.get(edge);
  g.dy_batch = time * channels, g.dy_time = channels, g.dk = pool.get(whole), g.dv = pool.get(whole);
  g.dw = pool.get(edge), g.du = pool.get(edge), g.dnum = pool.get(edge), g.dden = pool.get(edge), g.dmax = pool.get(edge);
  bestiary_wkv_backward(&s, &g);
}

// A matrix in a format, in memory of exactly its size.
struct Packed {
  Matrix m = {};
  std::vector<char> data;
  std::vector<float> scales;
  Packed(Pool& pool, i64 outputs, i64 inputs, i64 format, bool bias) {
    m.outputs = outputs, m.inputs = inputs, m.format = format;
    data.resize(bestiary_pack_bytes(format, outputs, inputs));
    scales.resize(format == 2 ? (outputs + 15) / 16 * 16 : 0);
    m.data = data.data(), m.scales = scales.data(), m.bias = bias ? pool.get(outputs) : nullptr;
    bestiary_pack(&m, pool.get(outputs * inputs), data.data(), scales.data());
  }
};

void matvec_products(i64 outputs, i64 inputs, i64 format, i64 rows) {
  Pool pool;
  Packed p(pool, outputs, inputs, format, rows & 1);
  bestiary_multiply(&p.m, rows, pool.get(rows * inputs), inputs, pool.get(rows * outputs), outputs);
  bestiary_unpack(&p.m, outputs - 1, 1, pool.get(inputs));
  const i64 which[] = {outputs - 1, 0, outputs / 2};
  bestiary_gather(&p.m, 3, which, pool.get(3 * inputs));
}

// kind: no gates, a head's, a channel's, the general form.
void delta_rule(i64 batch, i64 time, i64 heads, i64 keys, i64 values, int kind) {
  Pool pool;
  const i64 steps = batch * time * heads, states = batch * heads * keys * values;
  const i64 per_gate = kind > 1 ? keys : 1, per_chunk = bestiary_delta_steps(keys, values);
  const bool general = kind == 3;
  const DeltaStrides by_key = {time * heads * keys, heads * keys, keys}, by_value = {time * heads * values, heads * values, values};
  Delta d = {};
  d.batch = batch, d.time = time, d.heads = heads, d.keys = keys, d.values = values;
  d.gates = kind > 1 ? 2 : kind, d.scale = 0.5;
  d.q = pool.get(steps * keys), d.k = pool.get(steps * keys), d.v = pool.get(steps * values);
  d.beta = general ? nullptr : pool.get(steps, 0, 2);
  d.g = kind ? pool.get(steps * per_gate, -3, 0) : nullptr;
  d.a = general ? pool.get(steps * keys) : nullptr, d.b = general ? pool.get(steps * keys) : nullptr;
  d.at_q = d.at_k = d.at_a = d.at_b = by_key, d.at_v = by_value, d.at_beta = {time * heads, heads, 1};
  d.at_g = {time * heads * per_gate, heads * per_gate, per_gate};
  d.before = pool.get(states), d.after = pool.get(states), d.o = pool.get(steps * values);
  bestiary_delta_forward(&d);  // saves nothing
  d.starts = pool.get(batch * heads * ((time + per_chunk - 1) / per_chunk) * keys * ((values + W - 1) / W * W));
  bestiary_delta_forward(&d);
  DeltaBack r = {};
  const i64 parts = bestiary_delta_panels(values) * steps;
  r.dout = pool.get(steps * values), r.dafter = time % 2 ? pool.get(states) : nullptr, r.at_dout = by_value;
  r.dq = pool.get(parts * keys), r.dk = pool.get(parts * keys), r.dg = kind ? pool.get(parts * per_gate) : nullptr;
  r.da = general ? pool.get(parts * keys) : nullptr, r.db = general ? pool.get(parts * keys) : nullptr;
  r.dbeta = general ? nullptr : pool.get(parts), r.dv = pool.get(steps * values), r.dbefore = pool.get(states);
  bestiary_delta_backward(&d, &r);
}

void linear_attention(i64 batch, i64 time, i64 groups, i64 shared, i64 keys, i64 values, i64 decay, bool bonus, bool ones) {
  Pool pool;
  const i64 heads = groups * shared, whole = batch * time * heads, memory = batch * heads * keys * (values + ones);
  LinearAttention s = {};
  s.batch = batch, s.time = time, s.heads = heads, s.groups = groups, s.keys = keys, s.values = values;
  s.decay = decay, s.ones = ones, s.scale = 0.5f, s.eps = 1e-6f;
  s.q = pool.get(batch * time * groups * keys, 0.1f), s.k = pool.get(batch * time * groups * keys, 0.1f);
  s.v = pool.get(whole * values), s.g = pool.get(whole * (decay == 2 ? keys : 1), -50, 0);
  s.bonus = bonus ? pool.get(heads * keys, 0.1f) : nullptr;
  s.q_batch = s.k_batch = time * groups * keys, s.q_time = s.k_time = groups * keys, s.q_head = s.k_head = keys;
  s.v_batch = time * heads * values, s.v_time = heads * values, s.v_head = values;
  s.g_head = decay == 2 ? keys : 1, s.g_time = heads * s.g_head, s.g_batch = time * s.g_time;
  s.before = pool.get(memory, 0.1f), s.o = pool.get(whole * values), s.after = pool.get(memory);
  s.norms = pool.get(whole);
  const float* before = s.before;
  for (const float* past : {before, static_cast<const float*>(nullptr)})
    s.before = past, bestiary_linear_attention_forward(&s);  // saves nothing, and a single step goes by itself
  s.before = time % 2 ? before : nullptr;
  s.starts = pool.get(bestiary_linear_attention_starts(batch, time, heads, keys, values + ones));
  bestiary_linear_attention_forward(&s);
  LinearAttentionBack r = {};
  const i64 parts = bestiary_linear_attention_parts(heads, groups);
  r.dy = pool.get(whole * values), r.o = s.o, r.dafter = time % 2 ? pool.get(memory) : nullptr;
  r.dy_batch = s.v_batch, r.dy_time = s.v_time, r.dy_head = s.v_head;
  r.dq = pool.get(parts * batch * time * groups * keys), r.dk = pool.get(parts * batch * time * groups * keys);
  r.dv = pool.get(whole * values), r.dg = pool.get(decay ? whole * s.g_head : 0);
  r.dbonus = pool.get(bonus ? batch * heads * keys : 0), r.dbefore = pool.get(memory);
  bestiary_linear_attention_backward(&s, &r);
}

// One instruction, its operands in memory of exactly their sizes.
struct Single {
  Pool pool;
  std::vector<Operand> operands;
  std::vector<void*> regions = {nullptr};
  Instruction i = {};

  Single(i64 op, std::initializer_list<i64> shape) {
    i.op = op, i.shared = 1;
    i64 n = 0;
    for (i64 size : shape) i.shape[n++] = size;
  }
  // A contiguous operand of these axes.
  float* operand(std::initializer_list<i64> axes, float low = -1, float high = 1) {
    i64 count = 1;
    Operand o = {-1, 0, {}};
    for (i64 n = static_cast<i64>(axes.size()) - 1; n >= 0; n--) o.stride[n] = count, count *= axes.begin()[n];
    float* p = pool.get(count, low, high);
    o.at = reinterpret_cast<i64>(p);
    operands.push_back(o);
    return p;
  }
  void nothing() { operands.push_back({-1, 0, {}}); }
  i64 region(void* p) {
    regions.push_back(p);
    return static_cast<i64>(regions.size()) - 1;
  }
  void run(i64 scratch) {
    Program p = {1, 1, scratch, 2, &i, operands.data()};
    bestiary_program(&p, regions.data());
  }
};

i64 whole_groups(i64 n) { return (n + 31) / 32 * 32; }

int instructions() {
  int ran = 0;
  for (i64 n : {1, 15, 16, 33, 150}) {
    for (i64 which = 0; which < 23; which++, ran++) {
      Single s(program::UNARY, {2, 1, 3, n});
      s.i.number[0] = which, s.operand({2, 1, 3, n}), s.operand({2, 1, 3, n}, 0.1f, 2), s.run(0);
    }
    for (i64 which = 0; which < 7; which++, ran++) {
      Single s(program::BINARY, {2, 1, 3, n});
      s.i.number[0] = which, s.operand({2, 1, 3, n}), s.operand({2, 1, 3, n}), s.operand({2, 1, 3, n}, 1, 2), s.run(0);
    }
    for (i64 which = 0; which < 4; which++, ran++) {
      Single s(program::REDUCE, {2, 1, 3, n});
      s.i.number[0] = which, s.operand({2, 1, 3, 1}), s.operand({2, 1, 3, n});
      s.operands[0].stride[3] = 0, s.run(0);
    }
    std::vector<i64> last(n + 2, n - 1);
    Single gather(program::GATHER, {2, 1, 3, n + 2});
    gather.operand({2, 1, 3, n + 2}), gather.operand({2, 1, 3, n});
    gather.operands.push_back({-1, reinterpret_cast<i64>(last.data()), {}}), gather.run(0), ran++;
    Single lerp(program::LERP, {2, 1, 3, n});
    for (int k = 0; k < 4; k++) lerp.operand({2, 1, 3, n});
    lerp.run(0), ran++;
    Single norm(program::LAYER_NORM, {1, 2, 3, n});
    for (int k = 0; k < 4; k++) norm.operand({1, 2, 3, n});
    norm.i.real[0] = 1e-5, norm.run(0);
    for (i64 k : {1, 17})
      for (bool turned : {false, true}) {
        Single s(program::BATCHED, {3, 2, n, k});
        s.operand({3, 2, n}), s.operand({3, 2, k}), s.operand({3, k, n});
        if (turned) s.operands[2].stride[1] = 1, s.operands[2].stride[2] = k;
        s.run(0), ran++;
      }
    for (i64 taps : {1, 2, 4})
      for (i64 bias : {0, 1}) {
        Single s(program::CONVOLUTION, {2, n});
        s.operand({2, n}), s.operand({2, taps - 1, n}), s.operand({2, n}), s.operand({taps, n}), s.operand({2, taps - 1, n});
        s.operand({n}), s.i.number[0] = taps, s.i.number[1] = s.i.number[2] = bias, s.run(0), ran++;
      }
    for (i64 states : {1, 16}) {
      Single s(program::SCAN, {2, n, states});
      s.operand({2, n}), s.operand({2, states, n}), s.operand({2, n}), s.operand({2, n}), s.operand({states, n}, -1, 0);
      s.operand({2, states}), s.operand({2, states}), s.operand({2, states, n}), s.operand({n}), s.operand({n}), s.operand({2, n});
      for (int k = 0; k < 4; k++) s.i.number[k] = 1;
      s.run(0), ran++;
    }
    Single sums(program::WKV, {2, n});
    for (int k = 0; k < 4; k++) sums.operand({2, n});
    sums.operand({2, n}), sums.operand({2, n}), sums.operand({n}, -1, 0), sums.operand({n});
    sums.operand({2, n}), sums.operand({2, n}, 0, 1), sums.operand({2, n}), sums.run(0), ran++;
    for (i64 keys : {1, 19})
      for (i64 kind = 0; kind < 6; kind++, ran++) {
        const i64 decay = kind % 3, more = kind / 3;
        Single s(program::LINEAR, {2, 4, keys, n});
        s.operand({2, 4, n}), s.operand({2, 4, keys, n + more}), s.operand({2, 2, keys}), s.operand({2, 2, keys});
        s.operand({2, 4, n}), s.operand({2, 4, decay == 2 ? keys : 1}, -1, 0), s.operand({4, keys}), s.operand({2, 4, keys, n + more});
        s.i.number[0] = 2, s.i.number[1] = decay, s.i.number[2] = !more, s.i.number[3] = more, s.i.real[0] = s.i.real[1] = 1;
        s.run(2 * whole_groups(keys));
        Single d(program::DELTA, {2, 4, keys, n});
        d.operand({2, 4, n}), d.operand({2, 4, keys, n}), d.operand({2, 4, keys}), d.operand({2, 4, keys}), d.operand({2, 4, n});
        d.operand({2, 4, 1}), d.operand({2, 4, decay == 2 ? keys : 1}, -1, 0), d.operand({2, 4, keys}), d.operand({2, 4, keys});
        d.operand({2, 4, keys, n}), d.i.number[0] = decay, d.i.number[1] = !more, d.i.number[2] = more, d.i.real[0] = 1;
        d.run(2 * whole_groups(keys));
      }
    for (i64 keys : {1, 19})
      for (i64 window : {0, 1, 2, 70})
        for (i64 past : {0, 1, 69, 100}) {
          const i64 slots = window ? window - 1 : past + 1;
          i64 positions[2] = {past, past / 2}, next[2];
          Single s(program::ATTEND, {2, 4, keys, n});
          s.operand({2, 4, n}), s.operand({2, slots, 2, keys}), s.operand({2, slots, 2, n}), s.operand({2, 4, keys});
          s.operand({2, 2, keys}), s.operand({2, 2, n});
          if (window) s.operand({2, slots, 2, keys}), s.operand({2, slots, 2, n});
          else s.operands.push_back(s.operands[1]), s.operands.push_back(s.operands[2]);
          s.i.number[0] = 2, s.i.number[1] = window, s.i.number[2] = s.region(positions);
          s.i.number[3] = s.region(reinterpret_cast<void*>(slots)), s.i.real[0] = 1;
          s.run(64 + 2 * whole_groups(keys > n ? keys : n)), ran++;
          Single more(program::ADVANCE, {2});
          more.i.shared = 0, more.i.number[0] = more.region(positions), more.i.number[1] = more.region(next), more.run(0);
        }
    for (i64 keys : {1, 19})
      for (i64 levels : {1, 2, 5})
        for (i64 past : {0, 1, 7, 100})
          for (bool same : {false, true}) {
            i64 positions[2] = {past, past / 2};
            const i64 count = 2 * levels * 4 * keys * n;
            Single s(program::FENWICK, {2, 4, keys, n});
            Operand memory = {-1, 0, {levels * 4 * keys * n, 4 * keys * n, keys * n, n}};
            memory.at = reinterpret_cast<i64>(s.pool.get(count));
            s.operand({2, 4, n}), s.operands.push_back(memory), s.operand({2, 4, keys}), s.operand({2, 4, keys});
            s.operand({2, 4, n}), s.operand({2, 4}, -1, 0), s.operand({2, 4, levels + 1});
            if (!same) memory.at = reinterpret_cast<i64>(s.pool.get(count));
            s.operands.push_back(memory), s.i.number[0] = levels, s.i.number[1] = s.region(positions), s.i.real[0] = 1;
            s.run(whole_groups(n)), ran++;
          }
    for (i64 rows : {1, 3, 9, 17})
      for (i64 format = 0; format < 4; format++) {
        Pool pool;
        Packed p(pool, 33, n, format, true);
        Single s(program::PRODUCT, {rows});
        s.operand({rows, 33}), s.operand({rows, n}), s.i.matrix = &p.m;
        const bool pairs = rows > 16 && format == 1 && bestiary_rounds_inputs();
        s.run(pairs ? 24 * ((n + 1) / 2 * 2) + 16 * (256 + 24) : rows * whole_groups(n)), ran++;
      }
    for (i64 turned : {n / 2 * 2, n / 4 * 2}) {
      i64 positions[2] = {7, 1000};
      std::vector<double> speed(turned / 2, 0.5);
      Single s(program::ROTATE, {2, 3, n});
      s.operand({2, 3, n}), s.operand({2, 3, n}), s.operands.push_back({-1, reinterpret_cast<i64>(speed.data()), {}});
      s.i.shared = 0, s.i.number[0] = turned, s.i.number[1] = s.region(positions), s.run(0), ran++;
    }
  }
  return ran;
}

// kind: no gate, one before the norm, one after; then the same without a weight.
void norms(i64 rows, i64 channels, i64 groups, int kind) {
  Pool pool;
  const i64 many = rows * groups, whole = many * channels;
  Norm s = {};
  s.rows = many, s.channels = channels, s.groups = groups, s.first = kind % 3 == 1, s.eps = 1e-5;
  s.x = pool.get(whole), s.weight = kind < 3 ? pool.get(groups * channels) : nullptr;
  s.gate = kind % 3 ? pool.get(whole) : nullptr, s.x_row = s.gate_row = channels;
  s.y = pool.get(whole), s.scales = pool.get(many);
  bestiary_norm_forward(&s);
  NormBack b = {};
  b.dy = pool.get(whole), b.dy_row = channels, b.dx = pool.get(whole), b.dgate = kind % 3 ? pool.get(whole) : nullptr;
  b.dweight = kind < 3 ? pool.get(bestiary_norm_parts(many, groups) * groups * channels) : nullptr;
  bestiary_norm_backward(&s, &b);
}

void cross_entropies(i64 rows, i64 vocab, bool gradient) {
  Pool pool;
  std::vector<i64> targets(rows);
  for (i64 r = 0; r < rows; r++) targets[r] = r % 3 == 2 ? -1 : r * 7 % vocab;
  CrossEntropy s = {};
  s.rows = rows, s.vocab = s.row = vocab, s.gradient = gradient, s.logits = pool.get(rows * vocab);
  s.targets = targets.data(), s.weights = rows % 2 ? pool.get(rows) : nullptr, s.nats = pool.get(rows);
  bestiary_cross_entropy(&s);
}

void gates(i64 which) {
  Pool pool;
  for (i64 n : {0, W, 3 * W}) bestiary_elementwise(n, which, pool.get(n, -100, 100), pool.get(n));
}

}  // namespace

int main() {
  int ran = 0;
  for (i64 which = 0; which < 4; which++) gates(which), ran++;
  for (i64 batch : {1, 3})
    for (i64 time : {0, 1, 2, 5, 64, 65})
      for (i64 channels : {1, 7, 16, 35, 64, 150, 260}) {
        for (bool padded : {false, true}) recurrences(batch, time, channels, padded), ran++;
        for (i64 taps : {1, 2, 3, 4, 7, 16})
          for (int kind = 0; kind < 4; kind++) short_convolution_layers(batch, time, channels, taps, kind & 1, kind & 2), ran++;
      }
  for (i64 batch : {1, 3})
    for (i64 time : {0, 1, 2, 15, 16, 17, 40})
      for (i64 channels : {1, 5, 16, 33, 64, 150})
        for (float size : {1.0f, 100.0f})
          for (bool padded : {false, true}) wkv_sums(batch, time, channels, size, padded), ran++;
  for (i64 format = 0; format < 4; format++)
    for (i64 rows : {1, 2, 3, 5, 8, 17, 40}) {
      for (i64 outputs : {1, 15, 16, 17, 50})
        for (i64 inputs : {1, 2, 31, 32, 33, 100, 300}) matvec_products(outputs, inputs, format, rows), ran++;
    }
  for (i64 batch : {1, 3})
    for (i64 time : {0, 1, 2, 31, 32, 33, 70})
      for (i64 channels : {1, 3, 8, 16, 17, 33, 150})
        for (i64 states : {1, 2, 3, 7, 16, 31})
          for (int kind = 0; kind < 4; kind++) selective_scan(batch, time, channels, states, kind & 1, kind & 2), ran++;
  for (i64 batch : {1, 2})
    for (i64 time : {0, 1, 2, 31, 32, 33})
      for (i64 heads : {1, 3})
        for (i64 keys : {1, 3, 16, 19})
          for (i64 values : {1, 4, 15, 32, 50, 129})
            for (int kind = 0; kind < 4; kind++) delta_rule(batch, time, heads, keys, values, kind), ran++;
  for (int kind = 0; kind < 4; kind++) delta_rule(1, 9, 1, 300, 64, kind), ran++;  // short chunks
  for (i64 time : {0, 1, 2, 64, 65})
    for (i64 keys : {1, 3, 17})
      for (i64 values : {1, 8, 17, 64, 113})
        for (int kind = 0; kind < 12; kind++, ran++) {
          linear_attention(2, time, 1, 1, keys, values, kind % 3, kind / 3 & 1, kind / 6);
          linear_attention(1, time, 2, 5, keys, values, kind % 3, kind / 3 & 1, kind / 6);
        }
  ran += instructions();
  for (i64 rows : {0, 1, 3, 64, 65})
    for (i64 channels : {1, 3, 16, 33, 130})
      for (i64 groups : {1, 2, 70})
        for (int kind = 0; kind < 6; kind++) norms(rows, channels, groups, kind), ran++;
  for (i64 rows : {0, 1, 2, 7})
    for (i64 vocab : {1, 2, 15, 16, 17, 63, 64, 65, 200})
      for (bool gradient : {false, true}) cross_entropies(rows, vocab, gradient), ran++;
  const i64 facts[] = {bestiary_version(), bestiary_lanes(), bestiary_threads(), bestiary_rounds_inputs()};
  for (i64 fact : facts) std::printf("%d ", static_cast<int>(fact));
  std::printf("(version, lanes, threads, inputs rounded to bf16): %d shapes ran\n", ran);
}
