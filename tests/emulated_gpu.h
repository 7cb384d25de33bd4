// A GPU in plain C++: what csrc/cuda has for a real one between __CUDACC__ and its end, lane by
// lane. Included first, it makes kernels and launchers run on a CPU, compiled by a host compiler
// from the same source.
//
// Every thread of a block is a fiber that runs until it has to wait: at a barrier, or for the other
// lanes of its warp. Fragments are laid out as the PTX manual says of ldmatrix and mma.m16n8k16.
// What a GPU leaves open is varied from block to block: threads run first to last or last to first,
// copies arrive as soon as they start or as late as they may. Shared memory is watched word by
// word: two threads that touch the same between two barriers, one of them writing, are an error, as
// are matrix loads that meet in a bank, and copies that are unaligned or that no one waits for.
#pragma once

#include <c10/core/DispatchKey.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)

namespace ekfac_fast::cuda {

using std::min;

struct Bf16 {
  uint16_t bits;
  static constexpr uint16_t one = 0x3F80;
};

struct Fp16 {
  uint16_t bits;
  static constexpr uint16_t one = 0x3C00;
};

inline float widen(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float widen(Fp16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

namespace emulated {

struct Index {
  unsigned x;
};

struct Copy {
  char* to;
  const char* from;
  int bytes;
};

struct Thread {
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::deque<std::vector<Copy>> groups{1};  // of copies on their way, the open one last
};

// What a lane hands to the others of its warp.
struct Slot {
  void* out;
  const void* in;
  uint32_t B0, B1;
  float value;
};

struct Warp {
  Slot slots[32];
  int arrived = 0;
  long round = 0;
};

// The last accesses to four bytes of shared memory: between which barriers, by which thread.
struct Watched {
  long written = -1, read = -1;
  int writer = -1, reader = -1;
  int arriving = -1;  // thread whose copy is on its way
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Watched> watched;
  std::unique_ptr<char[]> memory;
  char* shared;
  int bytes, current = 0, at_barrier = 0;
  long barriers = 0, steps = 0;
  bool late;
  jmp_buf scheduler;
  std::function<void()> body;
  const char* error = nullptr;
};

inline Block* block = nullptr;
inline long blocks = 0;

// From one fiber to another: _setjmp leaves signals alone, so that nothing asks the kernel.
inline void jump(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

inline void yield() { jump(block->threads[block->current].here, block->scheduler); }

// Exceptions do not cross fibers: the scheduler throws.
[[noreturn]] inline void fail(const char* why) {
  block->error = why;
  for (;;) yield();
}

// each(word) for the words of shared memory from p on.
template <class Each>
void watch(const void* p, int bytes, const Each& each) {
  const long at = static_cast<const char*>(p) - block->shared;
  if (at < 0 || at + bytes > block->bytes) fail("an access outside of shared memory");
  if (at % bytes) fail("an unaligned access to shared memory");
  for (long i = at / 4; i < (at + bytes) / 4; i++) each(block->watched[i]);
}

inline void wrote(const void* p, int bytes, bool arriving) {
  const int me = block->current;
  watch(p, bytes, [&](Watched& w) {
    if (w.written == block->barriers && w.writer != me) fail("two threads write the same");
    if (w.read == block->barriers && w.reader != me) fail("written where another reads");
    if (w.arriving >= 0 && w.arriving != me) fail("written where a copy is on its way");
    w.written = block->barriers;
    w.writer = me;
    w.arriving = arriving ? me : -1;
  });
}

inline void reads(const void* p, int bytes) {
  const int me = block->current;
  watch(p, bytes, [&](Watched& w) {
    if (w.written == block->barriers && w.writer != me) fail("read what another writes");
    if (w.arriving >= 0) fail("read where a copy is on its way");
    // Two readers: no one may write, whoever it is.
    w.reader = w.read == block->barriers && w.reader != me ? -2 : me;
    w.read = block->barriers;
  });
}

inline void arrive(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
}

// compute() once all 32 lanes have left a slot.
template <class Compute>
void together(const Slot& slot, const Compute& compute) {
  Warp& warp = block->warps[block->current / 32];
  warp.slots[block->current % 32] = slot;
  if (++warp.arrived == 32) {
    compute(warp.slots);
    warp.arrived = 0;
    warp.round++;
  } else {
    for (const long round = warp.round; warp.round == round;) yield();
  }
  block->steps++;
}

}  // namespace emulated

inline emulated::Index threadIdx, blockIdx, gridDim;

namespace emulated {

inline void run_thread() {
  yield();
  block->body();
  block->threads[block->current].done = true;
  block->steps++;
  yield();
}

inline void run_block(int count, int shared, std::function<void()> body) {
  Block one;
  block = &one;
  one.threads.resize(count);
  one.warps.resize(count / 32);
  one.watched.resize(shared / 4);
  one.memory = std::make_unique<char[]>(shared + 16);
  one.shared = one.memory.get();
  one.shared += 15 - (reinterpret_cast<uintptr_t>(one.shared) + 15) % 16;
  one.bytes = shared;
  std::memset(one.shared, 0xFF, shared);  // NaN in every dtype
  one.body = std::move(body);
  one.late = blocks / 2 % 2;
  const bool backwards = blocks++ % 2;
  for (Thread& thread : one.threads) {
    constexpr size_t size = 64 << 10;
    thread.stack = std::make_unique_for_overwrite<char[]>(size);
    ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = thread.stack.get();
    fresh.uc_stack.ss_size = size;
    makecontext(&fresh, run_thread, 0);
    // Onto its stack and back at once.
    one.current = static_cast<int>(&thread - one.threads.data());
    if (_setjmp(one.scheduler) == 0) setcontext(&fresh);
  }
  for (int left = count; left > 0;) {
    const long before = one.steps;
    left = 0;
    for (int i = 0; i < count; i++) {
      one.current = backwards ? count - 1 - i : i;
      Thread& thread = one.threads[one.current];
      if (thread.done) continue;
      threadIdx.x = one.current;
      jump(one.scheduler, thread.here);
      if (one.error) throw std::runtime_error(one.error);
      left += !thread.done;
    }
    if (left && one.steps == before) throw std::runtime_error("every thread waits for another");
  }
  for (const Thread& thread : one.threads) {
    for (const auto& group : thread.groups) {
      if (!group.empty()) throw std::runtime_error("a copy that no one waited for");
    }
  }
}

}  // namespace emulated

inline char* shared_memory() { return emulated::block->shared; }

template <class T>
void store_shared(void* to, const T& x) {
  emulated::wrote(to, sizeof(T), false);
  *static_cast<T*>(to) = x;
}
template <class T>
T load_shared(const void* from) {
  emulated::reads(from, sizeof(T));
  return *static_cast<const T*>(from);
}

inline void __syncthreads() {
  emulated::Block& block = *emulated::block;
  block.steps++;
  if (++block.at_barrier == static_cast<int>(block.threads.size())) {
    block.at_barrier = 0;
    block.barriers++;
  } else {
    for (const long barriers = block.barriers; block.barriers == barriers;) emulated::yield();
  }
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulated::fail("a copy of less than 0 or more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(from) % 16) emulated::fail("a copy from an unaligned address");
  const emulated::Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes};
  emulated::wrote(to, 16, true);
  if (!emulated::block->late) emulated::arrive(copy);
  emulated::block->threads[emulated::block->current].groups.back().push_back(copy);
}

inline void copy_commit() {
  emulated::block->threads[emulated::block->current].groups.emplace_back();
}

template <int N>
void copy_wait() {
  auto& groups = emulated::block->threads[emulated::block->current].groups;
  for (; groups.size() > N + 1; groups.pop_front()) {
    for (const emulated::Copy& copy : groups.front()) {
      emulated::wrote(copy.to, 16, false);
      if (emulated::block->late) emulated::arrive(copy);
    }
  }
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&x)[4], const void* row) {
  emulated::reads(row, 16);
  emulated::together({x, row}, [&](const emulated::Slot* lanes) {
    for (int matrix = 0; matrix < 4; matrix++) {
      unsigned banks = 0;
      for (int r = 0; r < 8; r++) {
        banks |= 1u << reinterpret_cast<uintptr_t>(lanes[8 * matrix + r].in) / 16 % 8;
      }
      if (banks != 0xFF) emulated::fail("rows of a matrix load are in the same bank");
    }
    for (int lane = 0; lane < 32; lane++) {
      for (int matrix = 0; matrix < 4; matrix++) {
        auto element = [&](int r, int c) {
          return static_cast<const uint16_t*>(lanes[8 * matrix + r].in)[c];
        };
        const int p = lane / 4, q = lane % 4 * 2;
        const uint32_t low = TRANSPOSED ? element(q, p) : element(p, q);
        const uint32_t high = TRANSPOSED ? element(q + 1, p) : element(p, q + 1);
        static_cast<uint32_t*>(lanes[lane].out)[matrix] = low | high << 16;
      }
    }
  });
}

template <class E>
void multiply_add(float (&C)[4], const uint32_t (&A)[4], uint32_t B0, uint32_t B1, E) {
  emulated::together({C, A, B0, B1}, [](const emulated::Slot* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const int r = lane / 4, c = lane % 4 * 2;
      auto half = [](uint32_t x, int i) { return widen(E{static_cast<uint16_t>(x >> (16 * i))}); };
      const auto* x = static_cast<const uint32_t*>(lanes[lane].in);
      for (int i = 0; i < 2; i++) {
        a[r][c + i] = half(x[0], i);
        a[r + 8][c + i] = half(x[1], i);
        a[r][c + 8 + i] = half(x[2], i);
        a[r + 8][c + 8 + i] = half(x[3], i);
        b[c + i][r] = half(lanes[lane].B0, i);
        b[c + 8 + i][r] = half(lanes[lane].B1, i);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      for (int e = 0; e < 4; e++) {
        const int m = lane / 4 + e / 2 * 8, n = lane % 4 * 2 + e % 2;
        float& sum = static_cast<float*>(lanes[lane].out)[e];
        for (int k = 0; k < 16; k++) sum += a[m][k] * b[k][n];
      }
    }
  });
}

inline float from_lane_xor(float x, int mask) {
  float y;
  emulated::together({&y, nullptr, 0, 0, x}, [mask](const emulated::Slot* lanes) {
    for (int lane = 0; lane < 32; lane++) {
      *static_cast<float*>(lanes[lane].out) = lanes[lane ^ mask].value;
    }
  });
  return y;
}

constexpr auto kKey = c10::DispatchKey::CPU;

// A small chip: layers of a few tiles fill it.
inline int processors() { return 2; }

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared, const A&... args) {
  if (shared > 166912) throw std::runtime_error("more shared memory than a block has on sm_80");
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; i++) {
    blockIdx.x = static_cast<unsigned>(i);
    emulated::run_block(threads, shared, [&] { kernel(static_cast<P>(args)...); });
  }
}

}  // namespace ekfac_fast::cuda
