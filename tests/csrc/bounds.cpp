// Every kernel over many shapes, on buffers of exactly the size that they need: built with the sanitizers, it stops at the
// first access outside, and at undefined behaviour.
#include <cstdio>
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

}  // namespace

int main() {
  int ran = 0;
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
  std::printf("%d shapes ran\n", ran);
}
