// y = W x + b: for few rows of x, bound by reading W once, the product that decoding consists of; for many rows in blocks
// that stay in the first cache.
//
// W is packed once into panels of 16 outputs, input after input, so that a panel is read from front to end and 16 sums
// run side by side, one for each output. x stays in fp32. Formats of W:
//   0  fp32
//   1  bf16, rounded to nearest even; two inputs of an output side by side
//   2  int8, symmetric, a scale an output
//   3  int4, symmetric, a scale for each 32 inputs of an output, in bf16; two inputs share a byte
#pragma once

#include <cmath>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "parallel.h"

extern "C" {
struct Matrix {
  i64 outputs, inputs, format;
  const void* data;    // packed: see bestiary_pack_bytes
  const float* scales; // format 2: (outputs, padded to 16); format 3: inside data
  const float* bias;   // (outputs) or null
};
}

namespace matvec {

constexpr int P = 16;      // outputs of a panel
constexpr int V = P / W;   // vectors of a panel
constexpr int GROUP = 32;  // inputs that share a scale in format 3
constexpr int ROWS = 8;    // rows of x at once
constexpr i64 MANY = 16;   // rows from which on the product goes by blocks
constexpr i64 BLOCK = 256; // inputs of a block: a panel's and 8 rows' fit into the first cache

typedef std::uint8_t bytes_t __attribute__((vector_size(W)));
typedef std::int8_t chars_t __attribute__((vector_size(W)));
typedef std::uint16_t shorts_t __attribute__((vector_size(2 * W)));

inline i64 panels(i64 outputs) { return (outputs + P - 1) / P; }
inline i64 groups(i64 inputs) { return (inputs + GROUP - 1) / GROUP; }

// Bytes of one panel.
inline i64 panel_bytes(i64 format, i64 inputs) {
  switch (format) {
    case 0: return inputs * P * 4;
    case 1: return (inputs + 1) / 2 * P * 4;
    case 2: return inputs * P;
    default: return groups(inputs) * (GROUP * P / 2 + P * 2);
  }
}

inline std::uint16_t to_bf16(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, 4);
  if (x != x) return static_cast<std::uint16_t>(b >> 16 | 64);
  return static_cast<std::uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}
inline float from_bf16(std::uint16_t x) {
  std::uint32_t b = static_cast<std::uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &b, 4);
  return y;
}
inline vf bf16_lanes(const void* p) {
  shorts_t s;
  std::memcpy(&s, p, sizeof s);
  return floats(__builtin_convertvector(s, vi) << 16);
}

// W bytes as whole numbers. GCC converts vectors of bytes in many small steps where one instruction would do.
inline vi signed_lanes(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  chars_t c;
  std::memcpy(&c, p, sizeof c);
  return __builtin_convertvector(c, vi);
#endif
}
inline vi unsigned_lanes(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  bytes_t b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vi);
#endif
}

// The lowest four bits of each lane, less 8.
inline vf nibbles(vi x) {
#if defined(__AVX512F__)
  const vf table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  return reinterpret_cast<vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512>(table)));
#else
  return __builtin_convertvector((x & 15) - 8, vf);
#endif
}

// The weights of input k and vector v of a panel, in formats 0 to 2.
template <int F>
inline vf weights(const char* panel, i64 k, int v) {
  if constexpr (F == 0) return load(reinterpret_cast<const float*>(panel) + k * P + v * W);
  if constexpr (F == 1) {
    vi both;
    std::memcpy(&both, panel + (k / 2 * P + v * W) * 4, sizeof both);
    return floats(k & 1 ? both & static_cast<std::int32_t>(0xFFFF0000) : both << 16);
  }
  return __builtin_convertvector(signed_lanes(panel + k * P + v * W), vf);
}

// R rows of x, laid out (inputs, R), times one panel.
template <int F, int R>
inline void panel_times(const char* panel, i64 inputs, const float* x, vf (&sum)[R][V]) {
  // one row alone would wait for its own sums: several inputs at once, each with sums of its own
  constexpr int U = R == 1 ? 4 : R == 2 ? 2 : 1;
  vf part[U][R][V] = {};
  i64 k = 0;
  for (; k + U <= inputs; k += U)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        vf w = weights<F>(panel, k + u, v);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) part[u][r][v] += w * x[(k + u) * R + r];
      }
  for (; k < inputs; k++)
    for (int v = 0; v < V; v++) {
      vf w = weights<F>(panel, k, v);
      for (int r = 0; r < R; r++) part[0][r][v] += w * x[k * R + r];
    }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      sum[r][v] = part[0][r][v];
      for (int u = 1; u < U; u++) sum[r][v] += part[u][r][v];
    }
}

// The same in format 1, a pair of inputs at a time; x is as long as whole groups.
template <int R>
inline void panel_times_bf16(const char* panel, i64 inputs, const float* x, vf (&sum)[R][V]) {
  constexpr int U = R <= 2 ? 2 : 1, S = R <= 4 ? 2 : 1;  // pairs at once; sums for the two of a pair
  vf part[U][S][R][V] = {};
  const i64 pairs = (inputs + 1) / 2;
  auto add = [&](i64 k, int u) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      vi both;
      std::memcpy(&both, panel + (k * P + v * W) * 4, sizeof both);
      const vf low = floats(both << 16), high = floats(both & static_cast<std::int32_t>(0xFFFF0000));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        part[u][0][r][v] += low * x[2 * k * R + r];
        part[u][S - 1][r][v] += high * x[(2 * k + 1) * R + r];
      }
    }
  };
  i64 k = 0;
  for (; k + U <= pairs; k += U)
#pragma GCC unroll 2
    for (int u = 0; u < U; u++) add(k + u, u);
  for (; k < pairs; k++) add(k, 0);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      sum[r][v] = vf{};
      for (int u = 0; u < U; u++)
        for (int i = 0; i < S; i++) sum[r][v] += part[u][i][r][v];
    }
}

// The same in format 3: GROUP / 2 times 16 bytes, then 16 scales; x is as long as whole groups.
template <int R>
inline void panel_times_int4(const char* panel, i64 inputs, const float* x, vf (&sum)[R][V]) {
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = vf{};
  for (i64 g = 0; g < groups(inputs); g++, panel += GROUP * P / 2 + P * 2) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      vf part[2][R] = {};
#pragma GCC unroll 4
      for (int k = 0; k < GROUP / 2; k++) {
        vi whole = unsigned_lanes(panel + k * P + v * W);
        vf low = nibbles(whole), high = nibbles(whole >> 4);
        const float* xk = x + (g * GROUP + 2 * k) * R;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) part[0][r] += low * xk[r], part[1][r] += high * xk[R + r];
      }
      vf scale = bf16_lanes(panel + GROUP * P / 2 + v * W * 2);
      for (int r = 0; r < R; r++) sum[r][v] += (part[0][r] + part[1][r]) * scale;
    }
  }
}

template <int F, int R>
inline void rows_times(const Matrix& m, i64 panel, const float* x, float* y, i64 y_row) {
  vf sum[R][V];
  const char* data = static_cast<const char*>(m.data) + panel * panel_bytes(F, m.inputs);
  if constexpr (F == 3) panel_times_int4<R>(data, m.inputs, x, sum);
  else if constexpr (F == 1) panel_times_bf16<R>(data, m.inputs, x, sum);
  else panel_times<F, R>(data, m.inputs, x, sum);
  for (int v = 0; v < V; v++) {
    const i64 n = panel * P + v * W, rest = m.outputs - n;
    if (rest <= 0) return;
    const int lanes = static_cast<int>(rest < W ? rest : W);
    vf scale = F == 2 ? load(m.scales + n) : all(1.0f), bias = m.bias ? load(m.bias + n, lanes) : vf{};
    for (int r = 0; r < R; r++) store(y + r * y_row + n, F == 2 ? sum[r][v] * scale + bias : sum[r][v] + bias, lanes);
  }
}

template <int F>
inline void panel_rows(const Matrix& m, i64 panel, i64 rows, i64 long_x, const float* x, float* y, i64 y_row) {
  i64 r = 0;
  for (; r + ROWS <= rows; r += ROWS) rows_times<F, ROWS>(m, panel, x + r * long_x, y + r * y_row, y_row);
  if (rows - r >= 4) rows_times<F, 4>(m, panel, x + r * long_x, y + r * y_row, y_row), r += 4;
  if (rows - r >= 2) rows_times<F, 2>(m, panel, x + r * long_x, y + r * y_row, y_row), r += 2;
  if (rows - r >= 1) rows_times<F, 1>(m, panel, x + r * long_x, y + r * y_row, y_row);
}

// The same in the matrix's own format; x as `interleave` lays it.
inline void any_panel(const Matrix& m, i64 panel, i64 rows, i64 long_x, const float* x, float* y, i64 y_row) {
  switch (m.format) {
    case 0: return panel_rows<0>(m, panel, rows, long_x, x, y, y_row);
    case 1: return panel_rows<1>(m, panel, rows, long_x, x, y, y_row);
    case 2: return panel_rows<2>(m, panel, rows, long_x, x, y, y_row);
    default: return panel_rows<3>(m, panel, rows, long_x, x, y, y_row);
  }
}

// x (rows, inputs) in pieces of 8, 4, 2 and 1 rows, each (inputs, piece), zeros up to whole groups of inputs.
inline void interleave(const Matrix& m, i64 rows, const float* x, i64 x_row, float* to) {
  const i64 length = groups(m.inputs) * GROUP;
  for (i64 r = 0; r < rows;) {
    const i64 rest = rows - r, piece = rest >= ROWS ? ROWS : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
    for (i64 k = 0; k < length; k++)
      for (i64 i = 0; i < piece; i++) to[r * length + k * piece + i] = k < m.inputs ? x[(r + i) * x_row + k] : 0.0f;
    r += piece;
  }
}

// The first `count` inputs from `first` on of a panel in fp32, laid out as in format 0, without the scales of format 2.
inline void widen(const Matrix& m, i64 panel, i64 first, i64 count, float* to) {
  const char* data = static_cast<const char*>(m.data) + panel * panel_bytes(m.format, m.inputs);
  for (int v = 0; v < V; v++) {
    if (m.format == 1)
      for (i64 k = 0; k < count; k++) store(to + k * P + v * W, weights<1>(data, first + k, v));
    if (m.format == 2)
      for (i64 k = 0; k < count; k++) store(to + k * P + v * W, weights<2>(data, first + k, v));
    if (m.format == 3)
      for (i64 k = 0; k < count; k += 2) {
        const char* group = data + (first + k) / GROUP * (GROUP * P / 2 + P * 2);
        vf scale = bf16_lanes(group + GROUP * P / 2 + v * W * 2);
        vi whole = unsigned_lanes(group + (first + k) % GROUP / 2 * P + v * W);
        store(to + k * P + v * W, nibbles(whole) * scale);
        if (k + 1 < count) store(to + (k + 1) * P + v * W, nibbles(whole >> 4) * scale);
      }
  }
}

// sums (R rows, 16) += x (count, R) times a block of a panel.
template <int R>
inline void block_times(const float* panel, i64 count, const float* x, float* sums) {
  vf sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = load(sums + r * P + v * W);
  for (i64 k = 0; k < count; k++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      vf w = load(panel + k * P + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[r][v] += w * x[k * R + r];
    }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(sums + r * P + v * W, sum[r][v]);
}

#if defined(__AVX512F__)
#define BESTIARY_BF16 1
// The same with both in bf16, pairs of inputs at a time, for processors that multiply these at once.
template <int R>
__attribute__((target("avx512bf16"))) inline void pairs_times(const char* panel, i64 pairs, const std::uint32_t* x, float* sums) {
  __m512 sum[R];
  for (int r = 0; r < R; r++) sum[r] = _mm512_loadu_ps(sums + r * P);
  for (i64 k = 0; k < pairs; k++) {
    const __m512bh w = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + k * P * 4));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      sum[r] = _mm512_dpbf16_ps(sum[r], w, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x[k * R + r]))));
  }
  for (int r = 0; r < R; r++) _mm512_storeu_ps(sums + r * P, sum[r]);
}
inline bool pairs_at_once() {
  static const bool able = __builtin_cpu_supports("avx512bf16");
  return able;
}
#else
#define BESTIARY_BF16 0
inline bool pairs_at_once() { return false; }
#endif

// Rows 8 i ... of x, transposed: (inputs, rows of this piece), in fp32 or as pairs of bf16.
inline i64 piece_rows(i64 rows, i64 first) { return rows - first < ROWS ? rows - first : ROWS; }

inline void lay(const Matrix& m, i64 count, const float* x, i64 x_row, bool pairs, float* to) {
  if (!pairs) {
    for (i64 i = 0; i < count; i++)
      for (i64 k = 0; k < m.inputs; k++) to[k * ROWS + i] = x[i * x_row + k];
    return;
  }
  auto* words = reinterpret_cast<std::uint32_t*>(to);
  for (i64 i = 0; i < count; i++)
    for (i64 k = 0; k < m.inputs; k += 2) {
      const std::uint32_t low = to_bf16(x[i * x_row + k]), high = k + 1 < m.inputs ? to_bf16(x[i * x_row + k + 1]) : 0;
      words[k / 2 * ROWS + i] = low | high << 16;
    }
}

inline bool in_pairs(const Matrix& m) { return m.format == 1 && pairs_at_once(); }

// Many rows in pieces of eight, each (inputs, 8): how many, the numbers of one, and what a panel needs beside them.
inline i64 pieces(i64 rows) { return (rows + ROWS - 1) / ROWS; }
inline i64 piece_length(const Matrix& m) { return (m.inputs + 1) / 2 * 2 * ROWS; }
inline i64 own_numbers(i64 rows) { return BLOCK * P + pieces(rows) * ROWS * P; }

inline void lay_piece(const Matrix& m, i64 piece, i64 rows, const float* x, i64 x_row, float* given) {
  float* to = given + piece * piece_length(m);
  if (piece_rows(rows, piece * ROWS) < ROWS) std::memset(to, 0, piece_length(m) * 4);
  lay(m, piece_rows(rows, piece * ROWS), x + piece * ROWS * x_row, x_row, in_pairs(m), to);
}

// A panel and many rows: for each block of inputs, all rows, 8 at a time; what is beyond the last row is computed as zero.
inline void many_panel(const Matrix& m, i64 panel, i64 rows, const float* given, float* own, float* y, i64 y_row) {
  const i64 count = pieces(rows), length = piece_length(m);
  float *block = own, *sums = own + BLOCK * P;
  const char* data = static_cast<const char*>(m.data) + panel * panel_bytes(m.format, m.inputs);
  std::memset(sums, 0, count * ROWS * P * 4);
  for (i64 first = 0; first < m.inputs; first += BLOCK) {
    const i64 inputs = m.inputs - first < BLOCK ? m.inputs - first : BLOCK;
#if BESTIARY_BF16
    if (in_pairs(m)) {
      for (i64 i = 0; i < count; i++)
        pairs_times<ROWS>(data + first / 2 * P * 4, (inputs + 1) / 2,
                          reinterpret_cast<const std::uint32_t*>(given + i * length) + first / 2 * ROWS, sums + i * ROWS * P);
      continue;
    }
#endif
    const float* wide = reinterpret_cast<const float*>(data) + first * P;
    if (m.format) widen(m, panel, first, inputs, block), wide = block;
    for (i64 i = 0; i < count; i++)
      block_times<ROWS>(wide, inputs, given + i * length + first * ROWS, sums + i * ROWS * P);
  }
  for (int v = 0; v < V; v++) {
    const i64 n = panel * P + v * W, rest = m.outputs - n;
    if (rest <= 0) return;
    const int lanes = static_cast<int>(rest < W ? rest : W);
    vf scale = m.format == 2 ? load(m.scales + n) : all(1.0f), bias = m.bias ? load(m.bias + n, lanes) : vf{};
    for (i64 r = 0; r < rows; r++) store(y + r * y_row + n, load(sums + r * P + v * W) * scale + bias, lanes);
  }
}

inline void multiply_many(const Matrix& m, i64 rows, const float* x, i64 x_row, float* y, i64 y_row) {
  const i64 work = rows * m.outputs * m.inputs;
  Buffer buffer(pieces(rows) * piece_length(m));
  if (buffer.missing()) return;
  float* given = buffer;
  parallel(pieces(rows), work, 0, [&](float*, i64 i) { lay_piece(m, i, rows, x, x_row, given); });
  parallel(panels(m.outputs), work, own_numbers(rows), [&](float* own, i64 panel) {
    many_panel(m, panel, rows, given, own, y, y_row);
  });
}

void multiply(const Matrix& m, i64 rows, const float* x, i64 x_row, float* y, i64 y_row) {
  if (rows >= MANY) return multiply_many(m, rows, x, x_row, y, y_row);
  const i64 length = groups(m.inputs) * GROUP;
  Buffer buffer(rows * length);
  if (buffer.missing()) return;
  float* given = buffer;
  interleave(m, rows, x, x_row, given);
  parallel(panels(m.outputs), rows * m.outputs * m.inputs, 0, [&](float*, i64 panel) {
    any_panel(m, panel, rows, length, given, y, y_row);
  });
}

inline float at(const Matrix& m, const float* w, i64 n, i64 k) { return n < m.outputs && k < m.inputs ? w[n * m.inputs + k] : 0.0f; }

inline int nearest(float x, int low, int high) {
  const int n = static_cast<int>(std::lrint(x));
  return n < low ? low : n > high ? high : n;
}

// W (outputs, inputs) into panels; m says the format. `scales` as in Matrix.
void pack(const Matrix& m, const float* w, char* to, float* scales) {
  parallel(panels(m.outputs), m.outputs * m.inputs, 0, [&](float*, i64 panel) {
    char* data = to + panel * panel_bytes(m.format, m.inputs);
    for (int j = 0; j < P; j++) {
      const i64 n = panel * P + j;
      if (m.format == 0)
        for (i64 k = 0; k < m.inputs; k++) reinterpret_cast<float*>(data)[k * P + j] = at(m, w, n, k);
      if (m.format == 1)
        for (i64 k = 0; k < (m.inputs + 1) / 2 * 2; k++)
          reinterpret_cast<std::uint16_t*>(data)[(k / 2 * P + j) * 2 + (k & 1)] = to_bf16(at(m, w, n, k));
      if (m.format == 2) {
        float most = 0, bad = 0;  // NaN where a weight is NaN or infinite: then the scale is, and so all that is computed of it
        for (i64 k = 0; k < m.inputs; k++) most = std::fmax(most, std::fabs(at(m, w, n, k))), bad += at(m, w, n, k) * 0.0f;
        scales[n] = most / 127 + bad;
        const float by = most > 0 && bad == 0 ? 127 / most : 0.0f;
        for (i64 k = 0; k < m.inputs; k++) data[k * P + j] = static_cast<char>(nearest(at(m, w, n, k) * by, -127, 127));
      }
      if (m.format == 3)
        for (i64 g = 0; g < groups(m.inputs); g++) {
          char* group = data + g * (GROUP * P / 2 + P * 2);
          float most = 0, bad = 0;  // the entry of largest size, with its sign: it becomes -8; NaN as in format 2
          for (i64 k = g * GROUP; k < (g + 1) * GROUP; k++) {
            const float x = at(m, w, n, k);
            if (std::fabs(x) > std::fabs(most)) most = x;
            bad += x * 0.0f;
          }
          const std::uint16_t scale = to_bf16(most / -8 + bad);
          reinterpret_cast<std::uint16_t*>(group + GROUP * P / 2)[j] = scale;
          const float size = from_bf16(scale), by = size != 0 && bad == 0 ? 1 / size : 0.0f;
          for (int k = 0; k < GROUP / 2; k++) {
            const i64 first = g * GROUP + 2 * k;
            const int low = nearest(at(m, w, n, first) * by, -8, 7) + 8, high = nearest(at(m, w, n, first + 1) * by, -8, 7) + 8;
            group[k * P + j] = static_cast<char>(low | high << 4);
          }
        }
    }
  });
}

// The packed weights of output n as numbers again: (inputs).
inline void unpack_one(const Matrix& m, i64 n, float* w) {
  const char* data = static_cast<const char*>(m.data) + n / P * panel_bytes(m.format, m.inputs);
  const int j = static_cast<int>(n % P);
  for (i64 k = 0; k < m.inputs; k++) {
    float value;
    if (m.format == 0) value = reinterpret_cast<const float*>(data)[k * P + j];
    else if (m.format == 1) value = from_bf16(reinterpret_cast<const std::uint16_t*>(data)[(k / 2 * P + j) * 2 + (k & 1)]);
    else if (m.format == 2) value = static_cast<float>(static_cast<signed char>(data[k * P + j])) * m.scales[n];
    else {
      const char* group = data + k / GROUP * (GROUP * P / 2 + P * 2);
      const int both = static_cast<unsigned char>(group[k % GROUP / 2 * P + j]);
      const float scale = from_bf16(reinterpret_cast<const std::uint16_t*>(group + GROUP * P / 2)[j]);
      value = static_cast<float>((k & 1 ? both >> 4 : both & 15) - 8) * scale;
    }
    w[k] = value;
  }
}

// Those of outputs first ... first + count - 1, or of the outputs that `which` names: (count, inputs).
void unpack(const Matrix& m, i64 first, i64 count, float* w) {
  parallel(count, count * m.inputs, 0, [&](float*, i64 i) { unpack_one(m, first + i, w + i * m.inputs); });
}
void gather(const Matrix& m, i64 count, const i64* which, float* w) {
  parallel(count, count * m.inputs, 0, [&](float*, i64 i) { unpack_one(m, which[i], w + i * m.inputs); });
}

}  // namespace matvec
