// The pages of memory that a result lies in.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace detr_family {

// Asks for huge pages where a result of megabytes is not in memory yet, and has the threads touch a piece each. Otherwise
// every 4 KiB of a result cost a fault in the middle of the work, for which several threads wait in line.
inline void prepare_pages(const torch::stable::Tensor& result, int64_t element_size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge;
  const uintptr_t last = (begin + uintptr_t(result.numel() * element_size)) / huge * huge;
  if (first >= last || madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) != 0) return;
  torch::stable::parallel_for(0, int64_t((last - first) / huge), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) *reinterpret_cast<volatile char*>(first + uintptr_t(i) * huge) = 0;
  });
#else
  (void)result;
  (void)element_size;
#endif
}

}  // namespace detr_family
