// Kernels that go through time: states, and gradients of all they read.
#pragma once

#include "case.h"

namespace {

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

// size: of keys, and of the exponent of the past, which every third channel lacks; decay: the fastest; bonus: its middle.
void wkv_of(i64 batch, i64 time, i64 channels, float size, float decay, float bonus, bool padded) {
  Case c(named("wkv", {batch, time, channels, static_cast<i64>(size), static_cast<i64>(decay), static_cast<i64>(bonus), padded}));
  const i64 whole = batch * time * channels, row = time * channels, edge = batch * channels;
  const Lengths lengths(batch, time, padded);
  Input k(whole, -size, size), v(whole), w(channels, -decay, 0), u(channels, bonus - 1, bonus + 1), dy(whole);
  Input means(edge), weights(edge, 0.1f, 1), units(edge, -size, size), dnum(edge), dden(edge), dmax(edge);
  for (Input* x : {&k, &v, &dy}) lengths.spoil(*x, channels);
  for (i64 i = 0; i < edge; i++) means.data[i] *= weights.data[i], units.data[i] = std::nearbyint(units.data[i]);
  auto past = [](const Input& x, float none) {
    std::vector<float> values = x.data;
    for (size_t i = 0; i < values.size(); i += 3) values[i] = none;
    return Input(values);
  };
  const Input num = past(means, 0), den = past(weights, 0), most = past(units, -1e38f);
  auto y = blank(whole), new_num = blank(edge), new_den = new_num, new_max = new_num;
  auto starts = blank(batch * ((time + bestiary_wkv_chunk() - 1) / bestiary_wkv_chunk()) * 3 * channels);
  Wkv s = {};
  s.batch = batch, s.time = time, s.channels = channels, s.k = k, s.v = v, s.w = w, s.u = u;
  s.num = num, s.den = den, s.max = most, s.k_batch = s.v_batch = row, s.k_time = s.v_time = channels;
  s.lengths = lengths.given(), s.y = y.data(), s.starts = starts.data();
  s.new_num = new_num.data(), s.new_den = new_den.data(), s.new_max = new_max.data();
  bestiary_wkv_forward(&s);

  // The unit of the sums, a whole number, is the kernel's choice: they are compared as shares of den.
  std::vector<Real> wanted_y(whole), wanted_num(edge), wanted_den(edge), wanted_max = most.real;
  auto found_num = new_num, found_den = new_den, given_num = dnum.data, given_den = dden.data;
  for (i64 b = 0; b < batch; b++)
    for (i64 d = 0; d < channels; d++) {
      const i64 at = b * channels + d;
      Real n = num[at], m = den[at], unit = 1;
      if (lengths.of[b]) {
        const float found = new_max[at];
        unit = std::exp(-static_cast<double>(found)), n = exp(most[at]) * n, m = exp(most[at]) * m;
        wanted_max[at] = std::nearbyint(found);
      }
      for (i64 t = 0; t < lengths.of[b]; t++) {
        const i64 here = b * row + t * channels + d;
        const Real mine = exp(u[d] + k[here]), now = exp(k[here]), decayed = exp(w[d]);
        wanted_y[here] = (n + mine * v[here]) / (m + mine);
        n = decayed * n + now * v[here], m = decayed * m + now;
      }
      const double share = m.value > 0 ? 1 / (m.value * unit.value) : 1;
      wanted_num[at] = n * unit * share, wanted_den[at] = m * unit * share;
      found_num[at] = static_cast<float>(new_num[at] * share), found_den[at] = static_cast<float>(new_den[at] * share);
      given_num[at] = static_cast<float>(dnum.data[at] * share), given_den[at] = static_cast<float>(dden.data[at] * share);
    }
  c.output("y", y, wanted_y, &dy);
  c.output("num", found_num, wanted_num, &dnum);
  c.output("den", found_den, wanted_den, &dden);
  c.output("max", new_max, wanted_max, &dmax);

  auto dk = blank(whole), dv = dk, dw = blank(edge), du = dw, dn = dw, dd = dw, dm = dw;
  WkvBack g = {};
  g.dy = dy, g.dnew_num = given_num.data(), g.dnew_den = given_den.data(), g.dnew_max = dmax;
  g.dy_batch = row, g.dy_time = channels, g.dk = dk.data(), g.dv = dv.data(), g.dw = dw.data(), g.du = du.data();
  g.dnum = dn.data(), g.dden = dd.data(), g.dmax = dm.data();
  bestiary_wkv_backward(&s, &g);
  c.gradient("dk", dk, k);
  c.gradient("dv", dv, v);
  c.gradient("dw", dw, w);
  c.gradient("du", du, u);
  c.gradient("dnum", dn, num);
  c.gradient("dden", dd, den);
  c.gradient("dmax", dm, most);
}

// decay: none, a head's, a key channel's; ones: divided by what queries find of the keys' sum; strength: the fastest decay.
void linear_attention_of(i64 batch, i64 time, i64 groups, i64 shared, i64 keys, i64 values, i64 decay, bool bonus, bool ones,
                         float strength) {
  Case c(named("linear attention", {batch, time, groups, shared, keys, values, decay, bonus, ones, static_cast<i64>(strength)}));
  const i64 heads = groups * shared, steps = batch * time * heads, columns = values + ones, memory = batch * heads * keys * columns;
  const i64 asked = batch * time * groups * keys, gates = decay == 2 ? keys : 1;
  const float least = ones ? 0.1f : -1;  // what divides stays away from zero
  Input q(asked, least), k(asked, least), v(steps * values), g(steps * gates, -strength, 0), u(heads * keys, least);
  Input before(memory, least), dy(steps * values), dafter(memory);
  auto o = blank(steps * values), after = blank(memory), norms = blank(ones ? steps : 0);
  auto starts = blank(bestiary_linear_attention_starts(batch, time, heads, keys, columns));
  LinearAttention s = {};
  s.batch = batch, s.time = time, s.heads = heads, s.groups = groups, s.keys = keys, s.values = values;
  s.decay = decay, s.ones = ones, s.scale = 0.5f, s.eps = 0.125f, s.q = q, s.k = k, s.v = v, s.g = g, s.before = before;
  if (bonus) s.bonus = u;
  s.q_batch = s.k_batch = time * groups * keys, s.q_time = s.k_time = groups * keys, s.q_head = s.k_head = keys;
  s.v_batch = time * heads * values, s.v_time = heads * values, s.v_head = values;
  s.g_batch = time * heads * gates, s.g_time = heads * gates, s.g_head = gates;
  s.o = o.data(), s.after = after.data(), s.norms = norms.data();

  std::vector<Real> wanted(steps * values), S = before.real, fade(gates);
  for (i64 step = 0; step < steps; step++) {  // a step of a head
    const i64 h = step % heads, b = step / heads / time, row = (step / heads * groups + h / shared) * keys;
    for (i64 i = 0; decay && i < gates; i++) fade[i] = exp(g[step * gates + i]);
    Real divisor = 1;
    for (i64 j = columns - 1; j >= 0; j--) {
      const Real value = j < values ? v[step * values + j] : Real(1);
      Real found;
      for (i64 i = 0; i < keys; i++) {
        Real& held = S[((b * heads + h) * keys + i) * columns + j];
        const Real written = k[row + i] * value;
        if (bonus) found += q[row + i] * (held + u[h * keys + i] * written);
        held = decay ? fade[decay == 2 ? i : 0] * held + written : held + written;
        if (!bonus) found += q[row + i] * held;
      }
      if (j == values) divisor = found * 0.5 + 0.125;
      else wanted[step * values + j] = found * 0.5 / divisor;
    }
  }
  if (time == 1) {  // a step that saves nothing
    bestiary_linear_attention_forward(&s);
    c.output("o of a step", o, wanted, nullptr);
    c.output("after a step", after, S, nullptr);
  }
  s.starts = starts.data();
  bestiary_linear_attention_forward(&s);
  c.output("o", o, wanted, &dy);
  c.output("after", after, S, &dafter);

  const i64 parts = bestiary_linear_attention_parts(heads, groups);
  auto dq = blank(parts * asked), dk = dq, dv = blank(steps * values), dg = blank(steps * gates), dbefore = blank(memory);
  auto du = blank(batch * heads * keys);
  LinearAttentionBack r = {};
  r.dy = dy, r.o = o.data(), r.dafter = dafter, r.dy_batch = s.v_batch, r.dy_time = s.v_time, r.dy_head = s.v_head;
  r.dq = dq.data(), r.dk = dk.data(), r.dv = dv.data(), r.dg = dg.data(), r.dbonus = du.data(), r.dbefore = dbefore.data();
  bestiary_linear_attention_backward(&s, &r);
  c.gradient("dq", dq, q);
  c.gradient("dk", dk, k);
  c.gradient("dv", dv, v);
  c.gradient("dbefore", dbefore, before);
  if (decay) c.gradient("dg", dg, g);
  if (bonus) c.gradient("dbonus", du, u);
}

// kind: no gates, a head's, a key channel's, the general form; strength: the fastest decay.
void delta_rule_of(i64 batch, i64 time, i64 heads, i64 keys, i64 values, int kind, float strength) {
  Case c(named("delta rule", {batch, time, heads, keys, values, kind, static_cast<i64>(strength)}));
  const i64 steps = batch * time * heads, memory = batch * heads * keys * values, gates = kind > 1 ? keys : 1;
  const i64 per_chunk = bestiary_delta_steps(keys, values), chunks = (time + per_chunk - 1) / per_chunk;
  const bool general = kind == 3;
  const float unit = 1 / std::sqrt(static_cast<float>(keys));  // keys are no longer than 1
  Input q(steps * keys), k(steps * keys, -unit, unit), v(steps * values), beta(steps, 0, 2), g(steps * gates, -strength, 0);
  Input a(steps * keys, -unit, unit), b(steps * keys, -unit, unit), before(memory), dy(steps * values), dafter(memory);
  auto o = blank(steps * values), after = blank(memory), starts = blank(batch * heads * chunks * keys * ((values + W - 1) / W * W));
  Delta s = {};
  s.batch = batch, s.time = time, s.heads = heads, s.keys = keys, s.values = values, s.gates = general ? 2 : kind, s.scale = 0.5;
  s.q = q, s.k = k, s.v = v, s.before = before, s.o = o.data(), s.after = after.data(), s.starts = starts.data();
  if (kind) s.g = g;
  if (general) s.a = a, s.b = b;
  else s.beta = beta;
  s.at_q = s.at_k = s.at_a = s.at_b = {time * heads * keys, heads * keys, keys}, s.at_beta = {time * heads, heads, 1};
  s.at_v = {time * heads * values, heads * values, values}, s.at_g = {time * heads * gates, heads * gates, gates};
  bestiary_delta_forward(&s);

  std::vector<Real> wanted(steps * values), S = before.real, fade(keys);
  for (i64 step = 0; step < steps; step++) {  // a step of a head
    const i64 h = step % heads, row = step / heads / time, at = step * keys;
    for (i64 i = 0; i < keys; i++) fade[i] = kind ? exp(g[kind > 1 ? at + i : step]) : Real(1);
    for (i64 j = 0; j < values; j++) {
      auto held = [&](i64 i) -> Real& { return S[((row * heads + h) * keys + i) * values + j]; };
      Real z, found, value = v[step * values + j];
      for (i64 i = 0; i < keys; i++) {
        if (general) z += a[at + i] * held(i);
        held(i) = fade[i] * held(i);
        if (!general) z += k[at + i] * held(i);
      }
      if (!general) value = beta[step] * (value - z);
      for (i64 i = 0; i < keys; i++) {
        held(i) += k[at + i] * value;
        if (general) held(i) += b[at + i] * z;
        found += q[at + i] * held(i);
      }
      wanted[step * values + j] = found * 0.5;
    }
  }
  c.output("o", o, wanted, &dy);
  c.output("after", after, S, &dafter);

  const i64 parts = bestiary_delta_panels(values) * steps;
  auto dq = blank(parts * keys), dk = dq, da = dq, db = dq, dg = blank(parts * gates), dbeta = blank(parts);
  auto dv = blank(steps * values), dbefore = blank(memory);
  DeltaBack r = {};
  r.dout = dy, r.dafter = dafter, r.at_dout = s.at_v, r.dq = dq.data(), r.dk = dk.data(), r.dv = dv.data();
  r.da = da.data(), r.db = db.data(), r.dg = dg.data(), r.dbeta = dbeta.data(), r.dbefore = dbefore.data();
  bestiary_delta_backward(&s, &r);
  c.gradient("dq", dq, q);
  c.gradient("dk", dk, k);
  c.gradient("dv", dv, v);
  c.gradient("dbefore", dbefore, before);
  if (kind) c.gradient("dg", dg, g);
  if (!general) return c.gradient("dbeta", dbeta, beta);
  c.gradient("da", da, a);
  c.gradient("db", db, b);
}

}  // namespace
