// Vectors of floats, as wide as the instruction set that this file is compiled for, and the functions that gates need.
//
// Each instruction set is one translation unit (kernels.cpp with other flags), so the width is a macro, and everything
// here is internal to it. Arithmetic is GCC's and Clang's on vector types; a * b + c becomes one fused operation.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

// Asks for the numbers at an address, which need not exist, to come near.
inline void soon(const float* p) { __builtin_prefetch(p, 0, 2); }

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

// Two vectors of blocks of B lanes become one, whose blocks hold the sums of halves of the first's, then of the second's.
template <int B>
constexpr int stays(int lane) { return lane % B < B / 2 ? lane : W + lane; }
template <int B>
constexpr int comes(int lane) { return lane % B < B / 2 ? lane + B / 2 : W + lane - B / 2; }
template <int B, int... L>
inline vf fold(vf x, vf y, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, y, stays<B>(L)...) + __builtin_shufflevector(x, y, comes<B>(L)...);
}
// B vectors as one, whose lanes l with l % B = i add up to the sum of x[i]; overwrites them. B = W: one sum a lane.
template <int B = W>
inline vf sums(vf* x) {
  if constexpr (B == 1) {
    return x[0];
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < B / 2; j++) x[j] = fold<B>(x[j], x[j + B / 2], std::make_integer_sequence<int, W>());
    return sums<B / 2>(x);
  }
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

#if defined(__AVX512F__)
inline vf rounded(vf x) { return reinterpret_cast<vf>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x), 8)); }
// p 2^n; 0 where x is less than `low`.
inline vf scaled(vf p, vf n, vf x, float low) {
  const __mmask16 counts = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(low), _CMP_NLT_UQ);
  return reinterpret_cast<vf>(_mm512_maskz_scalef_ps(counts, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
}
#else
// 2^n for whole n from -127, which gives 0, to 128, which gives what is infinite; t is n + 1.5 * 2^23.
inline vf power(vf t) { return floats((bits(t) << 23) + 0x3F800000); }
#endif

// exp(x), within 1 ulp for -87.3 < x < 88.3; 0 below, infinite above; NaN stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2.
inline vf exp(vf x) {
  const float low = -87.33654f, high = 88.8f, log2e = 1.44269504089f;
  const float most = -0.693145751953125f, rest = -1.42860682030941723e-6f;  // -ln 2 in two parts, the first with few bits
#if defined(__AVX512F__)
  const vf y = smaller(all(high), x), n = rounded(y * log2e);
  vf r = n * most + y;
  r = n * rest + r;
  return scaled(less_one(r) + 1.0f, n, x, low);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const vf y = smaller(all(high), larger(all(low), x)), t = y * log2e + magic, n = t - magic;
  vf r = n * most + y;
  r = n * rest + r;
  const vf e = (less_one(r) + 1.0f) * power(t);
  return x < all(low) ? vf{} : e;
#endif
}

// 2^x, within 1 ulp for -126 < x < 127.5; 0 below, infinite above; NaN stays NaN. x = n + r with |r| <= 1/2.
// A decay exp(d a) at many d is 2^(d b) with b = a log2(e): its argument needs no reduction that rounds.
inline vf exp2(vf x) {
#if defined(__AVX512F__)
  const vf r = reinterpret_cast<vf>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 8));  // 0 where x is infinite
#else
  const float magic = 12582912.0f;
  const vf y = smaller(all(128), larger(all(-127), x)), t = y + magic, r = y - (t - magic);
#endif
  vf p = all(1.5324314e-4f);  // made for the least relative error, given the first two
  p = p * r + 1.3390959e-3f;
  p = p * r + 9.6185179e-3f;
  p = p * r + 5.5503596e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return scaled(p, x - r, x, -126);
#else
  return p * power(t);
#endif
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

inline vf silu(vf x) { return x / (1.0f + exp(-x)); }
// The derivative of x * sigmoid(x), given both.
inline vf silu_slope(vf x, vf s) { return s * (1.0f + x * (1.0f - s)); }

}  // namespace
