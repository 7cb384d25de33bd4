// Sixteen rows of sixteen words at a time, in registers: rows D apart exchange blocks of D words,
// for D = 8, 4, 2, 1. Macros: an inlined helper's vectors would be split for the baseline before it
// is cloned.
#include <algorithm>

#include "clones.h"
#include "endings.h"

#define EIGHTS_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define EIGHTS_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FOURS_LOW 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define FOURS_HIGH 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define TWOS_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define TWOS_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define ONES_LOW 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define ONES_HIGH 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define EXCHANGE(D, low, high)                         \
  for (int r = 0; r < 16; r++) {                       \
    if (r & D) continue;                               \
    const Words x = rows[r], y = rows[r + D];          \
    rows[r] = __builtin_shufflevector(x, y, low);      \
    rows[r + D] = __builtin_shufflevector(x, y, high); \
  }

namespace ekfac_fast::cpu {

typedef uint32_t Words __attribute__((vector_size(64), aligned(1), may_alias));

CLONES void transpose(void* to, int64_t ldy, const void* from, int64_t ldx, int64_t m, int64_t n) {
  uint32_t* y = static_cast<uint32_t*>(to);
  const uint32_t* x = static_cast<const uint32_t*>(from);
  if (m < 16 || n < 16) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t i = 0; i < m; i++) y[j * ldy + i] = x[i * ldx + j];
    return;
  }
  // The last block of either side overlaps the one before.
  for (int64_t i0 = 0; i0 < m; i0 += 16) {
    const int64_t i = std::min(i0, m - 16);
    for (int64_t j0 = 0; j0 < n; j0 += 16) {
      const int64_t j = std::min(j0, n - 16);
      Words rows[16];
      for (int l = 0; l < 16; l++) rows[l] = *reinterpret_cast<const Words*>(x + (i + l) * ldx + j);
      EXCHANGE(8, EIGHTS_LOW, EIGHTS_HIGH)
      EXCHANGE(4, FOURS_LOW, FOURS_HIGH)
      EXCHANGE(2, TWOS_LOW, TWOS_HIGH)
      EXCHANGE(1, ONES_LOW, ONES_HIGH)
      for (int l = 0; l < 16; l++) *reinterpret_cast<Words*>(y + (j + l) * ldy + i) = rows[l];
    }
  }
}

}  // namespace ekfac_fast::cpu
