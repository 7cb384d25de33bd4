// What this CPU multiplies natively. Zero on other architectures than x86-64: there every 16-bit
// operand is widened to fp32 when it is packed.
#pragma once

namespace ekfac_fast::cpu {

#if defined(__x86_64__)
inline bool has_avx2() { return __builtin_cpu_supports("avx2"); }
inline bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
inline bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16"); }
inline bool is_intel() { return __builtin_cpu_is("intel"); }
#else
inline bool has_avx2() { return false; }
inline bool has_avx512() { return false; }
inline bool has_bf16_products() { return false; }
inline bool is_intel() { return false; }
#endif

}  // namespace ekfac_fast::cpu
