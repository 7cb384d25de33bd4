// The instructions that kernels here are made of, each a function: nothing else in them is PTX.
// They are nvcc's; another compiler is given these functions, and `launch.h`'s first ones,
// beforehand.
//
// mma.sync and cp.async, which sm_80 has and every later chip runs. wgmma would be needed for the
// last third of Hopper's peak, with operands and barriers of its own; it is not here because it
// would be written without a measurement.
#pragma once

#ifdef __CUDACC__

#include <cstdint>

namespace ekfac_fast::cuda {

struct Bf16 {
  uint16_t bits;
  static constexpr uint16_t one = 0x3F80;
};

struct Fp16 {
  uint16_t bits;
  static constexpr uint16_t one = 0x3C00;
};

__device__ inline float widen(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float widen(Fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Plain accesses to shared memory, by name since an emulated GPU watches them.
template <class T>
__device__ inline void store_shared(void* to, const T& x) {
  *static_cast<T*>(to) = x;
}
template <class T>
__device__ inline T load_shared(const void* from) {
  return *static_cast<const T*>(from);
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts a copy of 16 bytes into shared memory; of the source, `bytes` are read and the rest is 0.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// Copies this thread started since the last call are a group, which may be empty.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the last N have arrived.
template <int N>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices; lane l names row l % 8 of matrix l / 8, and holds of each matrix elements
// 2 (l % 4) and the next of row l / 4, or of column l / 4 if TRANSPOSED.
template <bool TRANSPOSED>
__device__ inline void load_matrices(uint32_t (&x)[4], const void* row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// C[16,8] += A[16,16] B[16,8] by one warp. Lane l, with r = l / 4 and c = 2 (l % 4), holds
//   A  (r,c) (r,c+1)   (r+8,c) (r+8,c+1)   (r,c+8) (r,c+9)   (r+8,c+8) (r+8,c+9)
//   B  (c,r) (c+1,r)   (c+8,r) (c+9,r)
//   C  (r,c) (r,c+1)   (r+8,c) (r+8,c+1)
__device__ inline void multiply_add(float (&C)[4], const uint32_t (&A)[4], uint32_t B0, uint32_t B1,
                                    Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(C[0]), "+f"(C[1]), "+f"(C[2]), "+f"(C[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1));
}
__device__ inline void multiply_add(float (&C)[4], const uint32_t (&A)[4], uint32_t B0, uint32_t B1,
                                    Fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(C[0]), "+f"(C[1]), "+f"(C[2]), "+f"(C[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1));
}

__device__ inline float from_lane_xor(float x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFF, x, mask);
}

}  // namespace ekfac_fast::cuda

#endif
