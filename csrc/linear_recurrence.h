// The diagonal linear recurrence h_t = a_t h_{t-1} + b_t of real numbers, forward and backward.
//
// W channels are the lanes of a vector, which runs through time; a row ends at its length.
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

inline i64 blocks(const Recurrence& r) { return (r.channels + W - 1) / W; }
inline i64 real(const Recurrence& r, i64 b) { return r.lengths ? r.lengths[b] : r.time; }
inline int lanes(const Recurrence& r, i64 c) { return static_cast<int>(r.channels - c < W ? r.channels - c : W); }

void forward(const Recurrence& r) {
  const i64 nb = blocks(r);
  parallel(r.batch * nb, 4 * r.batch * r.time * r.channels, 0, [&](float*, i64 item) {
    const i64 b = item / nb, c = item % nb * W, end = real(r, b);
    const int n = lanes(r, c);
    vf h = load(r.before + b * r.channels + c, n);
    for (i64 t = 0; t < r.time; t++) {
      float* out = r.h + (b * r.time + t) * r.channels + c;
      if (t >= end) {
        store(out, vf{}, n);
        continue;
      }
      h = load(r.a + b * r.a_batch + t * r.a_time + c, n) * h + load(r.b + b * r.b_batch + t * r.b_time + c, n);
      store(out, h, n);
    }
    store(r.after + b * r.channels + c, h, n);
  });
}

void backward(const Recurrence& r, const RecurrenceBack& g) {
  const i64 nb = blocks(r);
  parallel(r.batch * nb, 6 * r.batch * r.time * r.channels, 0, [&](float*, i64 item) {
    const i64 b = item / nb, c = item % nb * W, end = real(r, b);
    const int n = lanes(r, c);
    vf flow = load(g.dafter + b * r.channels + c, n);
    for (i64 t = r.time - 1; t >= 0; t--) {
      const i64 at = (b * r.time + t) * r.channels + c;
      if (t >= end) {
        store(g.da + at, vf{}, n);
        store(g.db + at, vf{}, n);
        continue;
      }
      flow += load(g.dh + b * g.dh_batch + t * g.dh_time + c, n);
      vf old = t ? load(r.h + at - r.channels, n) : load(r.before + b * r.channels + c, n);
      store(g.da + at, flow * old, n);
      store(g.db + at, flow, n);
      flow = flow * load(r.a + b * r.a_batch + t * r.a_time + c, n);
    }
    store(g.dbefore + b * r.channels + c, flow, n);
  });
}

}  // namespace linear_recurrence
