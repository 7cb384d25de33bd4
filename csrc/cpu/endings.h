// What is done to a tile while it is in cache: plain loops, for AVX-512, AVX2 and neither.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace ekfac_fast::cpu {

// y[i] = x[i], converted
void convert(float* y, const float* x, int64_t n);
void convert(float* y, const c10::BFloat16* x, int64_t n);
void convert(float* y, const c10::Half* x, int64_t n);
void convert(c10::BFloat16* y, const float* x, int64_t n);
void convert(c10::BFloat16* y, const c10::BFloat16* x, int64_t n);
void convert(c10::Half* y, const float* x, int64_t n);
void convert(double* y, const double* x, int64_t n);
// y[r ldy + 2 i], y[r ldy + 2 i + 1] = even[r ldx + i], odd[r ldx + i]
void interleave(c10::BFloat16* y, int64_t ldy, const c10::BFloat16* even, const c10::BFloat16* odd,
                int64_t ldx, int64_t n, int64_t rows);

// y[j ldy + i] = x[i ldx + j] for i < m, j < n: words of 32 bits, whatever they hold
void transpose(void* y, int64_t ldy, const void* x, int64_t ldx, int64_t m, int64_t n);

// y += x
void add(float* y, const float* x, int64_t n);
void add(double* y, const double* x, int64_t n);
// y += x^2
void add_squares(float* y, const float* x, int64_t n);
void add_squares(double* y, const double* x, int64_t n);
// y = x / (lam + damping)
void divide(float* y, const float* x, const float* lam, float damping, int64_t n);
void divide(double* y, const double* x, const double* lam, double damping, int64_t n);
// y = 1 / (lam + damping); whether all are finite
bool reciprocals(float* y, const float* lam, float damping, int64_t n);
bool reciprocals(double* y, const double* lam, double damping, int64_t n);
// sum x^2 / (lam + damping) over m rows of n, ldx and ldl apart
float damped_norm(const float* x, int64_t ldx, const float* lam, int64_t ldl, float damping,
                  int64_t m, int64_t n);
double damped_norm(const double* x, int64_t ldx, const double* lam, int64_t ldl, double damping,
                   int64_t m, int64_t n);
// sum x^2 w, the same
float weighted_norm(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t m, int64_t n);
double weighted_norm(const double* x, int64_t ldx, const double* w, int64_t ldw, int64_t m,
                     int64_t n);
// y += u (v + bias), elementwise
void add_products(float* y, const float* u, const float* v, const float* bias, int64_t n);
void add_products(double* y, const double* u, const double* v, const double* bias, int64_t n);
void add_products(float* y, const float* u, const float* v, float bias, int64_t n);
void add_products(double* y, const double* u, const double* v, double bias, int64_t n);
// y[g ldy] += sum_k x[g K + k], for `groups` of K
void add_group_sums(float* y, int64_t ldy, const float* x, int64_t groups, int64_t K);
void add_group_sums(double* y, int64_t ldy, const double* x, int64_t groups, int64_t K);
// y[g ldy] += sum_k u[g K + k] v[g K + k], for `groups` of K
void add_group_dots(float* y, int64_t ldy, const float* u, const float* v, int64_t groups,
                    int64_t K);
void add_group_dots(double* y, int64_t ldy, const double* u, const double* v, int64_t groups,
                    int64_t K);
// y[g ldy] += sum_k u[g K + k] (v[g K + k] + bias[g K + k]), for `groups` of K
void add_group_dots(float* y, int64_t ldy, const float* u, const float* v, const float* bias,
                    int64_t groups, int64_t K);
void add_group_dots(double* y, int64_t ldy, const double* u, const double* v, const double* bias,
                    int64_t groups, int64_t K);
// sum x y
float dot(const float* x, const float* y, int64_t n);
double dot(const double* x, const double* y, int64_t n);
// S[p sx + q sy] += sum_ri X_p[r,i] Y_q[r,i] for p < nx, q < ny, each at most 4; over m rows of n
void dots(float* S, int64_t sx, int64_t sy, const float* const* X, int64_t nx, int64_t ldx,
          const float* const* Y, int64_t ny, int64_t ldy, int64_t m, int64_t n);
void dots(float* S, int64_t sx, int64_t sy, const c10::BFloat16* const* X, int64_t nx, int64_t ldx,
          const c10::BFloat16* const* Y, int64_t ny, int64_t ldy, int64_t m, int64_t n);
void dots(double* S, int64_t sx, int64_t sy, const double* const* X, int64_t nx, int64_t ldx,
          const double* const* Y, int64_t ny, int64_t ldy, int64_t m, int64_t n);

}  // namespace ekfac_fast::cpu
