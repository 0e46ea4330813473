// Vectors of floats, as wide as the instruction set that this file is compiled for, and the functions that gates need.
//
// Each instruction set is one translation unit (kernels.cpp with other flags), so the width is a macro, and everything
// here is internal to it. Arithmetic is GCC's and Clang's on vector types; a * b + c becomes one fused operation.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BESTIARY_BYTES 64
#elif defined(__AVX2__)
#define BESTIARY_BYTES 32
#else
#define BESTIARY_BYTES 16
#endif

namespace {

using i64 = std::int64_t;
constexpr int W = BESTIARY_BYTES / 4;  // lanes

typedef float vf __attribute__((vector_size(BESTIARY_BYTES)));
typedef std::int32_t vi __attribute__((vector_size(BESTIARY_BYTES)));

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

// The first n lanes alone, 0 <= n <= W; the others read as zero and stay as they are in memory.
inline vf load(const float* p, int n) {
  if (n == W) return load(p);
  vf x = {};
  std::memcpy(&x, p, 4 * n);
  return x;
}
inline void store(float* p, vf x, int n) {
  if (n == W) return store(p, x);
  std::memcpy(p, &x, 4 * n);
}

inline vf all(float x) { return x - vf{}; }
inline vi bits(vf x) {
  vi y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline vf floats(vi x) {
  vf y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
// Comparisons with NaN are false: b where a is NaN, so that a NaN in b survives.
// GCC makes two instructions of a comparison and a choice where one does the same.
#if defined(__AVX512F__)
inline vf larger(vf a, vf b) { return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b))); }
inline vf smaller(vf a, vf b) { return reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b))); }
#elif defined(__AVX2__)
inline vf larger(vf a, vf b) { return reinterpret_cast<vf>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b))); }
inline vf smaller(vf a, vf b) { return reinterpret_cast<vf>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b))); }
#else
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vf smaller(vf a, vf b) { return a < b ? a : b; }
#endif
inline float sum(vf x) {
  float s[W];
  store(s, x);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; i++) s[i] += s[i + step];
  return s[0];
}

// exp(r) - 1 for |r| <= ln 2 / 2, exact also where r is small: a polynomial made for the least relative error of exp(r).
inline vf less_one(vf r) {
  vf p = all(1.3814550820e-3f);
  p = p * r + 8.3687287174e-3f;
  p = p * r + 4.1668389499e-2f;
  p = p * r + 1.6666520535e-1f;
  p = p * r + 4.9999993440e-1f;
  return p * (r * r) + r;
}

// exp(x), within 1 ulp for -87.3 < x < 88.3; 0 below, infinite above; NaN stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2.
inline vf exp(vf x) {
  // above `high` n is 128, and the scale infinite
  const float low = -87.33654f, high = 88.5f, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  vf y = smaller(all(high), larger(all(low), x));
  vf t = y * 1.44269504089f + magic;
  vf n = t - magic;
  vf r = n * -0.693145751953125f + y;  // ln 2 in two parts, the first with few bits
  r = n * -1.42860682030941723e-6f + r;
  vf p = less_one(r) + 1.0f;
  vf scale = floats((bits(t) << 23) + 0x3F800000);
  vf e = p * scale;
  return x < all(low) ? vf{} : e;
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)); log1p(u) = 2 atanh(u / (2 + u)), a series in the square of that.
inline vf softplus(vf x) {
  vf size = x < vf{} ? -x : x;
  vf u = exp(-size), s = u / (u + 2.0f), q = s * s;
  vf p = all(0.0769230769f);
  p = p * q + 0.0909090909f;
  p = p * q + 0.111111111f;
  p = p * q + 0.142857143f;
  p = p * q + 0.2f;
  p = p * q + 0.333333333f;
  p = p * q * s + s;
  return larger(vf{}, x) + (p + p);
}

// The slope of softplus where it is d: 1 - exp(-d), a series where that would cancel.
inline vf softplus_slope(vf d) {
  vf series = d * (1.0f - d * (0.5f - d * (1.0f / 6.0f)));
  return d < all(0.02f) ? series : 1.0f - exp(-d);
}

inline vf silu(vf x) { return x * sigmoid(x); }
// The derivative of x * sigmoid(x), given both.
inline vf silu_slope(vf x, vf s) { return s * (1.0f + x * (1.0f - s)); }

}  // namespace
