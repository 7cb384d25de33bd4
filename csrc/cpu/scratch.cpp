#include "scratch.h"

#include <ATen/Context.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/alloc_cpu.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>

namespace ekfac_fast::cpu {
namespace {

// Pages of 2 MiB where the system gives them to those that ask: the first touch of a large result
// in pages of 4 KiB took as long as a third of `precondition`.
void* fresh(int64_t bytes) {
  void* data = c10::alloc_cpu(bytes);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return data;
}

class Pool {
 public:
  // The smallest kept block of at least `bytes`, unless half of it would lie idle; else a new one.
  void* take(int64_t& bytes) {
    const std::lock_guard guard(mutex_);
    const auto block = free_.lower_bound(bytes);
    if (block == free_.end() || block->first > 2 * bytes) return fresh(bytes);
    void* data = block->second;
    bytes = block->first;
    kept_ -= bytes;
    free_.erase(block);
    return data;
  }

  void give(void* data, int64_t bytes) {
    const std::lock_guard guard(mutex_);
    if (bytes > kKept) return c10::free_cpu(data);
    // Many small blocks of layers gone by would keep a large one out.
    while (kept_ + bytes > kKept) {
      const auto smallest = free_.begin();
      if (smallest->first >= bytes) return c10::free_cpu(data);
      kept_ -= smallest->first;
      c10::free_cpu(smallest->second);
      free_.erase(smallest);
    }
    kept_ += bytes;
    free_.emplace(bytes, data);
  }

 private:
  std::mutex mutex_;
  std::multimap<int64_t, void*> free_;
  int64_t kept_ = 0;
};

// Never destroyed: tensors may outlive static objects.
Pool& pool() {
  static Pool* kept = new Pool;
  return *kept;
}

}  // namespace

at::Tensor scratch(at::IntArrayRef sizes, at::ScalarType dtype) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (const int64_t size : sizes) bytes *= size;
  bytes = std::max<int64_t>(bytes, 64);
  void* data = pool().take(bytes);
  at::Tensor x = at::from_blob(
      data, sizes, [bytes](void* block) { pool().give(block, bytes); }, at::dtype(dtype));
  // As torch fills its own memory under torch.use_deterministic_algorithms.
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    x.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return x;
}

}  // namespace ekfac_fast::cpu
