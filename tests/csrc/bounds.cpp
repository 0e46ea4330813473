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
  if (time == 1) bestiary_linear_attention_forward(&s);  // a single step, which saves nothing
  s.starts = pool.get(bestiary_linear_attention_starts(batch, time, heads, keys, values + ones));
  bestiary_linear_attention_forward(&s);
  LinearAttentionBack r = {};
  const i64 parts = bestiary_linear_attention_parts(heads, groups);
  r.dy = pool.get(whole * values), r.o = s.o, r.dafter = pool.get(memory);
  r.dy_batch = s.v_batch, r.dy_time = s.v_time, r.dy_head = s.v_head;
  r.dq = pool.get(parts * batch * time * groups * keys), r.dk = pool.get(parts * batch * time * groups * keys);
  r.dv = pool.get(whole * values), r.dg = pool.get(decay ? whole * s.g_head : 0);
  r.dbonus = pool.get(bonus ? batch * heads * keys : 0), r.dbefore = pool.get(memory);
  bestiary_linear_attention_backward(&s, &r);
}

}  // namespace

int main() {
  int ran = 0;
  for (i64 batch : {1, 3})
    for (i64 time : {0, 1, 2, 31, 32, 33, 70})
      for (i64 channels : {1, 3, 8, 16, 17, 33, 150})
        for (i64 states : {1, 2, 3, 7, 16, 31})
          for (int kind = 0; kind < 4; kind++) selective_scan(batch, time, channels, states, kind & 1, kind & 2), ran++;
  for (i64 time : {0, 1, 2, 64, 65})
    for (i64 keys : {1, 3, 17})
      for (i64 values : {1, 8, 17, 64, 113})
        for (int kind = 0; kind < 12; kind++, ran++) {
          linear_attention(2, time, 1, 1, keys, values, kind % 3, kind / 3 & 1, kind / 6);
          linear_attention(1, time, 2, 5, keys, values, kind % 3, kind / 3 & 1, kind / 6);
        }
  std::printf("%d shapes ran\n", ran);
}
