// The diagonal linear recurrence h_t = a_t h_{t-1} + b_t of real numbers, forward and backward.
//
// A panel of channels, some vectors wide, keeps h in registers while it runs through time; a row ends at its length.
#pragma once

#include "parallel.h"

extern "C" {
struct Recurrence {
  i64 batch, time, channels;
  const float *a, *b, *before;  // before: (batch, channels)
  i64 a_batch, a_time, b_batch, b_time;
  const i64* lengths;
  float *h, *after;             // (batch, time, channels), (batch, channels)
};
struct RecurrenceBack {
  const float *dh, *dafter;
  i64 dh_batch, dh_time;
  float *da, *db, *dbefore;     // as h, h, before
};
}

namespace linear_recurrence {

constexpr int PANEL = 128 / W;  // vectors

// A panel of one row, whole where all its vectors are full of channels.
template <bool Whole>
struct Panel {
  i64 b, first, end, channels;  // row, first channel, length, channels from there on
  Panel(const Recurrence& r, i64 b, i64 panel)
      : b(b), first(panel * PANEL * W), end(r.lengths ? r.lengths[b] : r.time), channels(r.channels - first) {}
  int vectors() const { return Whole ? PANEL : static_cast<int>((channels + W - 1) / W); }
  int lanes(int p) const { return Whole || channels - p * W >= W ? W : static_cast<int>(channels - p * W); }
};

template <bool Whole>
void forward(const Recurrence& r, const Panel<Whole>& v) {
  vf h[PANEL];
  const i64 edge = v.b * r.channels + v.first;
  for (int p = 0; p < v.vectors(); p++) h[p] = load(r.before + edge + p * W, v.lanes(p));
  float* out = r.h + v.b * r.time * r.channels + v.first;
  for (i64 t = 0; t < v.end; t++) {
    const float *a = r.a + v.b * r.a_batch + t * r.a_time + v.first, *b = r.b + v.b * r.b_batch + t * r.b_time + v.first;
    for (int p = 0; p < v.vectors(); p++) {
      h[p] = load(a + p * W, v.lanes(p)) * h[p] + load(b + p * W, v.lanes(p));
      store(out + t * r.channels + p * W, h[p], v.lanes(p));
    }
  }
  for (i64 t = v.end; t < r.time; t++)
    for (int p = 0; p < v.vectors(); p++) store(out + t * r.channels + p * W, vf{}, v.lanes(p));
  for (int p = 0; p < v.vectors(); p++) store(r.after + edge + p * W, h[p], v.lanes(p));
}

template <bool Whole>
void backward(const Recurrence& r, const RecurrenceBack& g, const Panel<Whole>& v) {
  vf flow[PANEL];
  const i64 edge = v.b * r.channels + v.first, row = v.b * r.time * r.channels + v.first;
  for (int p = 0; p < v.vectors(); p++) flow[p] = load(g.dafter + edge + p * W, v.lanes(p));
  for (i64 t = v.end; t < r.time; t++)
    for (int p = 0; p < v.vectors(); p++) {
      store(g.da + row + t * r.channels + p * W, vf{}, v.lanes(p));
      store(g.db + row + t * r.channels + p * W, vf{}, v.lanes(p));
    }
  for (i64 t = v.end - 1; t >= 0; t--) {
    const i64 at = row + t * r.channels;
    const float *a = r.a + v.b * r.a_batch + t * r.a_time + v.first, *old = t ? r.h + at - r.channels : r.before + edge;
    const float* dh = g.dh + v.b * g.dh_batch + t * g.dh_time + v.first;
    for (int p = 0; p < v.vectors(); p++) {
      const vf f = flow[p] + load(dh + p * W, v.lanes(p));
      store(g.da + at + p * W, f * load(old + p * W, v.lanes(p)), v.lanes(p));
      store(g.db + at + p * W, f, v.lanes(p));
      flow[p] = f * load(a + p * W, v.lanes(p));
    }
  }
  for (int p = 0; p < v.vectors(); p++) store(g.dbefore + edge + p * W, flow[p], v.lanes(p));
}

// run(panel) for every panel of every row.
template <class Run>
void panels(const Recurrence& r, i64 operations, Run run) {
  const i64 n = (r.channels + PANEL * W - 1) / (PANEL * W);
  parallel(r.batch * n, operations * r.batch * r.time * r.channels, 0, [&](float*, i64 item) {
    const i64 b = item / n, panel = item % n;
    if ((panel + 1) * PANEL * W <= r.channels) run(Panel<true>(r, b, panel));
    else run(Panel<false>(r, b, panel));
  });
}

void forward(const Recurrence& r) {
  panels(r, 4, [&](const auto& panel) { forward(r, panel); });
}
void backward(const Recurrence& r, const RecurrenceBack& g) {
  panels(r, 6, [&](const auto& panel) { backward(r, g, panel); });
}

}  // namespace linear_recurrence
