#include "endings.h"

#include "clones.h"

// Sums are split over independent lanes in source order, so that they vectorise without -ffast-math
// and are the same in every run; LANES floats fill two AVX-512 registers.
#define LANES 32

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
  CLONES void add_products(T* y, const T* u, const T* v, const T* bias, int64_t n) { \
    for (int64_t i = 0; i < n; i++) y[i] += u[i] * (v[i] + bias[i]);                 \
  }

#define REDUCTION(T, name, parameters, term)         \
  CLONES T name parameters {                         \
    T lanes[LANES] = {};                             \
    int64_t i = 0;                                   \
    for (; i + LANES <= n; i += LANES) {             \
      for (int l = 0; l < LANES; l++) {              \
        const int64_t k = i + l;                     \
        lanes[l] += term;                            \
      }                                              \
    }                                                \
    T sum = 0;                                       \
    for (int l = 0; l < LANES; l++) sum += lanes[l]; \
    for (; i < n; i++) {                             \
      const int64_t k = i;                           \
      sum += term;                                   \
    }                                                \
    return sum;                                      \
  }

#define GROUP_SUMS(T)                                                                    \
  CLONES void add_group_sums(T* y, int64_t ldy, const T* x, int64_t groups, int64_t K) { \
    for (int64_t g = 0; g < groups; g++, x += K) {                                       \
      T lanes[16] = {}, sum = 0;                                                         \
      int64_t k = 0;                                                                     \
      for (; k + 16 <= K; k += 16) {                                                     \
        for (int l = 0; l < 16; l++) lanes[l] += x[k + l];                               \
      }                                                                                  \
      for (int l = 0; k && l < 16; l++) sum += lanes[l];                                 \
      for (; k < K; k++) sum += x[k];                                                    \
      y[g * ldy] += sum;                                                                 \
    }                                                                                    \
  }

// Sixteen running vectors: each loaded value meets four of the other side.
#define DOT_4X4(T, V, W)                                                                     \
  CLONES void dot_4x4(T* S, const T* const* X, int64_t ldx, const T* const* Y, int64_t ldy,  \
                      int64_t m, int64_t n) {                                                \
    typedef T V __attribute__((vector_size(64), aligned(sizeof(T))));                        \
    V sum[4][4] = {};                                                                        \
    for (int64_t r = 0; r < m; r++) {                                                        \
      int64_t i = 0;                                                                         \
      for (; i + W <= n; i += W) {                                                           \
        V x[4], y[4];                                                                        \
        for (int p = 0; p < 4; p++) x[p] = *reinterpret_cast<const V*>(X[p] + r * ldx + i);  \
        for (int q = 0; q < 4; q++) y[q] = *reinterpret_cast<const V*>(Y[q] + r * ldy + i);  \
        for (int p = 0; p < 4; p++)                                                          \
          for (int q = 0; q < 4; q++) sum[p][q] += x[p] * y[q];                              \
      }                                                                                      \
      for (; i < n; i++)                                                                     \
        for (int p = 0; p < 4; p++)                                                          \
          for (int q = 0; q < 4; q++) S[4 * p + q] += X[p][r * ldx + i] * Y[q][r * ldy + i]; \
    }                                                                                        \
    for (int p = 0; p < 4; p++)                                                              \
      for (int q = 0; q < 4; q++) {                                                          \
        T total = 0;                                                                         \
        for (int l = 0; l < W; l++) total += sum[p][q][l];                                   \
        S[4 * p + q] += total;                                                               \
      }                                                                                      \
  }

namespace ekfac_fast::cpu {

using c10::BFloat16;
using c10::Half;

CONVERT(float, float)
CONVERT(float, BFloat16)
CONVERT(float, Half)
CONVERT(BFloat16, float)
CONVERT(BFloat16, BFloat16)
CONVERT(Half, float)
CONVERT(double, double)

CLONES void interleave(BFloat16* y, const BFloat16* even, const BFloat16* odd, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    y[2 * i] = even[i];
    y[2 * i + 1] = odd[i];
  }
}

ELEMENTWISE(float)
ELEMENTWISE(double)
REDUCTION(float, damped_norm, (const float* x, const float* lam, float damping, int64_t n),
          x[k] * x[k] / (lam[k] + damping))
REDUCTION(double, damped_norm, (const double* x, const double* lam, double damping, int64_t n),
          x[k] * x[k] / (lam[k] + damping))
REDUCTION(float, dot, (const float* x, const float* y, int64_t n), x[k] * y[k])
REDUCTION(double, dot, (const double* x, const double* y, int64_t n), x[k] * y[k])
GROUP_SUMS(float)
GROUP_SUMS(double)
DOT_4X4(float, v16, 16)
DOT_4X4(double, v8, 8)

}  // namespace ekfac_fast::cpu
