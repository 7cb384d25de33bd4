// One symbol, three bodies, chosen by what the CPU can do when the library is loaded. Levels, not
// names of processors: "arch=skylake-avx512" is taken on that one alone, and any other runs the
// baseline. Other compilers get the baseline.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define CLONES
#endif
