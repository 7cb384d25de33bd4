// Dot products of bf16 as it lies, two terms a lane and instruction: nothing is paired, turned or
// widened beforehand. Sums are fp32.
#include "endings.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace ekfac_fast::cpu {
namespace {

using c10::BFloat16;
using Rows = const BFloat16* const*;

#if defined(__x86_64__) && defined(__GNUC__)

template <int P, int Q>
__attribute__((target("avx512f,avx512bw,avx512bf16"))) void block(float* S, int64_t sx, int64_t sy,
                                                                  Rows X, int64_t ldx, Rows Y,
                                                                  int64_t ldy, int64_t m,
                                                                  int64_t n) {
  __m512 sum[P][Q];
  for (int u = 0; u < P; u++)
    for (int v = 0; v < Q; v++) sum[u][v] = __m512{};
  for (int64_t r = 0; r < m; r++) {
    for (int64_t i = 0; i < n; i += 32) {
      const __mmask32 some = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
      __m512bh x[P], y[Q];
      for (int u = 0; u < P; u++)
        x[u] = (__m512bh)_mm512_maskz_loadu_epi16(some, X[u] + r * ldx + i);
      for (int v = 0; v < Q; v++)
        y[v] = (__m512bh)_mm512_maskz_loadu_epi16(some, Y[v] + r * ldy + i);
      for (int u = 0; u < P; u++)
        for (int v = 0; v < Q; v++) sum[u][v] = _mm512_dpbf16_ps(sum[u][v], x[u], y[v]);
    }
  }
  for (int u = 0; u < P; u++)
    for (int v = 0; v < Q; v++) {
      float total = 0;
      for (int l = 0; l < 16; l++) total += sum[u][v][l];
      S[u * sx + v * sy] += total;
    }
}

#else

template <int P, int Q>
void block(float* S, int64_t sx, int64_t sy, Rows X, int64_t ldx, Rows Y, int64_t ldy, int64_t m,
           int64_t n) {
  for (int u = 0; u < P; u++)
    for (int v = 0; v < Q; v++)
      for (int64_t r = 0; r < m; r++)
        for (int64_t i = 0; i < n; i++)
          S[u * sx + v * sy] += float(X[u][r * ldx + i]) * float(Y[v][r * ldy + i]);
}

#endif

}  // namespace

void dots(float* S, int64_t sx, int64_t sy, Rows X, int64_t nx, int64_t ldx, Rows Y, int64_t ny,
          int64_t ldy, int64_t m, int64_t n) {
  if (nx == 4 && ny == 4) return block<4, 4>(S, sx, sy, X, ldx, Y, ldy, m, n);
  if (nx == 4) {
    for (int64_t v = 0; v < ny; v++) block<4, 1>(S + v * sy, sx, sy, X, ldx, Y + v, ldy, m, n);
    return;
  }
  for (int64_t u = 0; u < nx; u++) {
    if (ny == 4) {
      block<1, 4>(S + u * sx, sx, sy, X + u, ldx, Y, ldy, m, n);
      continue;
    }
    for (int64_t v = 0; v < ny; v++) {
      block<1, 1>(S + u * sx + v * sy, sx, sy, X + u, ldx, Y + v, ldy, m, n);
    }
  }
}

}  // namespace ekfac_fast::cpu
