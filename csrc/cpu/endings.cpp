#include "endings.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "clones.h"
#include "isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

// Sums are split over independent lanes in source order, so that they vectorise without -ffast-math
// and are the same in every run. Vectors are AVX2's: wider ones are kept in memory where registers
// are no wider, ten times slower.
#define BYTES 32

#define CONVERT(To, From)                                         \
  CLONES void convert(To* y, const From* x, int64_t n) {          \
    for (int64_t i = 0; i < n; i++) y[i] = static_cast<To>(x[i]); \
  }

#define ELEMENTWISE(T)                                                               \
  CLONES void add(T* y, const T* x, int64_t n) {                                     \
    for (int64_t i = 0; i < n; i++) y[i] += x[i];                                    \
  }                                                                                  \
  CLONES void add_squares(T* y, const T* x, int64_t n) {                             \
    for (int64_t i = 0; i < n; i++) y[i] += x[i] * x[i];                             \
  }                                                                                  \
  CLONES void divide(T* y, const T* x, const T* lam, T damping, int64_t n) {         \
    for (int64_t i = 0; i < n; i++) y[i] = x[i] / (lam[i] + damping);                \
  }                                                                                  \
  CLONES bool reciprocals(T* y, const T* lam, T damping, int64_t n) {                \
    T most = 0;                                                                      \
    for (int64_t i = 0; i < n; i++) {                                                \
      y[i] = 1 / (lam[i] + damping);                                                 \
      most = y[i] > most ? y[i] : most;                                              \
    }                                                                                \
    return most <= std::numeric_limits<T>::max();                                    \
  }                                                                                  \
  CLONES void add_products(T* y, const T* u, const T* v, const T* bias, int64_t n) { \
    for (int64_t i = 0; i < n; i++) y[i] += u[i] * (v[i] + bias[i]);                 \
  }                                                                                  \
  CLONES void add_products(T* y, const T* u, const T* v, T bias, int64_t n) {        \
    for (int64_t i = 0; i < n; i++) y[i] += u[i] * (v[i] + bias);                    \
  }

// A sum of terms in `load(x + k)`: four vectors of lanes run through any number of stretches of k,
// then they are added up with what was left of each.
#define LANES(T)                                                           \
  typedef T V __attribute__((vector_size(BYTES), aligned(sizeof(T))));     \
  constexpr int64_t W = BYTES / sizeof(T);                                 \
  auto vector = [](const T* x) { return *reinterpret_cast<const V*>(x); }; \
  auto one = [](const T* x) { return *x; };                                \
  V lanes[4] = {};                                                         \
  T sum = 0, half[W / 2];

#define STRETCH(begin, end, term)            \
  {                                          \
    int64_t at = begin;                      \
    const auto load = vector;                \
    for (; at + 4 * W <= end; at += 4 * W) { \
      for (int lane = 0; lane < 4; lane++) { \
        const int64_t k = at + lane * W;     \
        lanes[lane] += term;                 \
      }                                      \
    }                                        \
    for (; at + W <= end; at += W) {         \
      const int64_t k = at;                  \
      lanes[0] += term;                      \
    }                                        \
    for (; at < end; at++) {                 \
      const int64_t k = at;                  \
      const auto load = one;                 \
      sum += term;                           \
    }                                        \
  }

#define TOTAL                                                        \
  const V all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);       \
  for (int l = 0; l < W / 2; l++) half[l] = all[l] + all[l + W / 2]; \
  for (int l = 0; l < W / 2; l++) sum += half[l];

#define REDUCTION(T, name, parameters, term) \
  CLONES T name parameters {                 \
    LANES(T)                                 \
    STRETCH(0, n, term)                      \
    TOTAL                                    \
    return sum;                              \
  }

#define NORM(T, name, parameters, term)                     \
  CLONES T name parameters {                                \
    LANES(T)                                                \
    for (int64_t r = 0; r < m; r++, x += ldx, lam += ldl) { \
      STRETCH(0, n, term)                                   \
    }                                                       \
    TOTAL                                                   \
    return sum;                                             \
  }

#define NORMS(T)                                                                              \
  NORM(T, damped_norm,                                                                        \
       (const T* x, int64_t ldx, const T* lam, int64_t ldl, T damping, int64_t m, int64_t n), \
       load(x + k) * load(x + k) / (load(lam + k) + damping))                                 \
  NORM(T, weighted_norm,                                                                      \
       (const T* x, int64_t ldx, const T* lam, int64_t ldl, int64_t m, int64_t n),            \
       load(x + k) * load(x + k) * load(lam + k))

#define GROUPS(T, name, parameters, term)  \
  CLONES void name parameters {            \
    for (int64_t g = 0; g < groups; g++) { \
      LANES(T)                             \
      STRETCH(g * K, (g + 1) * K, term)    \
      TOTAL                                \
      y[g * ldy] += sum;                   \
    }                                      \
  }

#define GROUP_SUMS(T)                                                                            \
  GROUPS(T, add_group_sums, (T * y, int64_t ldy, const T* x, int64_t groups, int64_t K),         \
         load(x + k))                                                                            \
  GROUPS(T, add_group_dots,                                                                      \
         (T * y, int64_t ldy, const T* u, const T* v, int64_t groups, int64_t K),                \
         load(u + k) * load(v + k))                                                              \
  GROUPS(T, add_group_dots,                                                                      \
         (T * y, int64_t ldy, const T* u, const T* v, const T* bias, int64_t groups, int64_t K), \
         load(u + k) * (load(v + k) + load(bias + k)))

// P x Q running vectors: of 4 x 4, each loaded value meets four of the other side.
#define BLOCK(T, W, P, Q)                                                           \
  for (; p + P <= nx; p += P) {                                                     \
    for (int64_t q = 0; q + Q <= ny; q += Q) {                                      \
      typedef T V __attribute__((vector_size(W * sizeof(T)), aligned(sizeof(T))));  \
      V sum[P][Q] = {};                                                             \
      T rest[P][Q] = {};                                                            \
      for (int64_t r = 0; r < m; r++) {                                             \
        const T *x[P], *y[Q];                                                       \
        for (int u = 0; u < P; u++) x[u] = X[p + u] + r * ldx;                      \
        for (int v = 0; v < Q; v++) y[v] = Y[q + v] + r * ldy;                      \
        int64_t i = 0;                                                              \
        for (; i + W <= n; i += W) {                                                \
          V a[P], b[Q];                                                             \
          for (int u = 0; u < P; u++) a[u] = *reinterpret_cast<const V*>(x[u] + i); \
          for (int v = 0; v < Q; v++) b[v] = *reinterpret_cast<const V*>(y[v] + i); \
          for (int u = 0; u < P; u++)                                               \
            for (int v = 0; v < Q; v++) sum[u][v] += a[u] * b[v];                   \
        }                                                                           \
        for (; i < n; i++)                                                          \
          for (int u = 0; u < P; u++)                                               \
            for (int v = 0; v < Q; v++) rest[u][v] += x[u][i] * y[v][i];            \
      }                                                                             \
      for (int u = 0; u < P; u++)                                                   \
        for (int v = 0; v < Q; v++) {                                               \
          for (int l = 0; l < W; l++) rest[u][v] += sum[u][v][l];                   \
          S[(p + u) * sx + (q + v) * sy] += rest[u][v];                             \
        }                                                                           \
    }                                                                               \
  }

// W4 lanes of four by Q4 running vectors: as many as there are registers for.
#define DOTS(name, T, W, W4, Q4)                                                             \
  CLONES void name(T* S, int64_t sx, int64_t sy, const T* const* X, int64_t nx, int64_t ldx, \
                   const T* const* Y, int64_t ny, int64_t ldy, int64_t m, int64_t n) {       \
    int64_t p = 0;                                                                           \
    if (ny % Q4 == 0) {                                                                      \
      BLOCK(T, W4, 4, Q4)                                                                    \
      BLOCK(T, W, 1, Q4)                                                                     \
    } else {                                                                                 \
      BLOCK(T, W, 4, 1)                                                                      \
      BLOCK(T, W, 1, 1)                                                                      \
    }                                                                                        \
  }

// Registers of AVX-512, or the sixteen of AVX2.
#define CHOSEN_DOTS(T)                                                                \
  void dots(T* S, int64_t sx, int64_t sy, const T* const* X, int64_t nx, int64_t ldx, \
            const T* const* Y, int64_t ny, int64_t ldy, int64_t m, int64_t n) {       \
    if (has_avx512()) return dots_of_32(S, sx, sy, X, nx, ldx, Y, ny, ldy, m, n);     \
    dots_of_16(S, sx, sy, X, nx, ldx, Y, ny, ldy, m, n);                              \
  }

#define PAIRS                                                                                   \
  0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, \
      13, 29, 14, 30, 15, 31

namespace ekfac_fast::cpu {

using c10::BFloat16;
using c10::Half;

CONVERT(float, float)
CONVERT(Half, float)
CONVERT(double, double)

#if defined(__x86_64__) && defined(__GNUC__)

__attribute__((target("avx2,f16c"))) static void widen(float* y, const Half* x, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
  }
  for (; i < n; i++) y[i] = static_cast<float>(x[i]);
}

#endif

// Through its class fp16 is taken apart bit by bit, ten times slower than the instruction.
void convert(float* y, const Half* x, int64_t n) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_avx2()) return widen(y, x, n);
#endif
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<float>(x[i]);
}

// bf16 as the bits it is: through its class none of these loops is vectorised.
typedef uint16_t Short __attribute__((may_alias));
typedef uint32_t Word __attribute__((may_alias));

void convert(BFloat16* y, const BFloat16* x, int64_t n) { std::memcpy(y, x, n * sizeof(*y)); }

CLONES void convert(float* y, const BFloat16* x, int64_t n) {
  Word* to = reinterpret_cast<Word*>(y);
  const Short* from = reinterpret_cast<const Short*>(x);
  for (int64_t i = 0; i < n; i++) to[i] = static_cast<uint32_t>(from[i]) << 16;
}

// To the nearest, ties to even; a NaN stays one.
CLONES void convert(BFloat16* y, const float* x, int64_t n) {
  Short* to = reinterpret_cast<Short*>(y);
  const Word* from = reinterpret_cast<const Word*>(x);
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = from[i], rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  }
}

// The last block overlaps the one before: no loop over what is left of narrow rows.
CLONES void interleave(BFloat16* y, int64_t ldy, const BFloat16* even, const BFloat16* odd,
                       int64_t ldx, int64_t n, int64_t rows) {
  typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(64), aligned(2), may_alias));
  for (int64_t r = 0; r < rows; r++) {
    const Short* low = reinterpret_cast<const Short*>(even + r * ldx);
    const Short* high = reinterpret_cast<const Short*>(odd + r * ldx);
    Word* to = reinterpret_cast<Word*>(y + r * ldy);
    for (int64_t i = 0; n < 16 && i < n; i++) to[i] = low[i] | static_cast<Word>(high[i]) << 16;
    for (int64_t i0 = 0; n >= 16 && i0 < n; i0 += 16) {
      const int64_t i = std::min(i0, n - 16);
      const Shorts x = *reinterpret_cast<const Shorts*>(low + i);
      const Shorts z = *reinterpret_cast<const Shorts*>(high + i);
      *reinterpret_cast<Words*>(to + i) = (Words)__builtin_shufflevector(x, z, PAIRS);
    }
  }
}

ELEMENTWISE(float)
ELEMENTWISE(double)
NORMS(float)
NORMS(double)
REDUCTION(float, dot, (const float* x, const float* y, int64_t n), load(x + k) * load(y + k))
REDUCTION(double, dot, (const double* x, const double* y, int64_t n), load(x + k) * load(y + k))
GROUP_SUMS(float)
GROUP_SUMS(double)
DOTS(dots_of_32, float, 16, 16, 4)
DOTS(dots_of_16, float, 8, 8, 2)
DOTS(dots_of_32, double, 8, 8, 4)
DOTS(dots_of_16, double, 4, 4, 2)
CHOSEN_DOTS(float)
CHOSEN_DOTS(double)

}  // namespace ekfac_fast::cpu
