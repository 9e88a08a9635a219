// The pages of memory that a result lies in.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace detr_family {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// Whether all of some memory seems to be there: one page of each step is asked for.
inline bool is_resident(uintptr_t first, uintptr_t last, uintptr_t step) {
  for (uintptr_t page = first; page < last; page += step) {
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(page), 1, &resident) != 0 || (resident & 1) == 0) return false;
  }
  return true;
}
#endif

// Asks for huge pages where a result of megabytes is not in memory yet, and has the threads touch a piece each. Otherwise
// every 4 KiB of a result cost a fault in the middle of the work, for which several threads wait in line. What is there
// already, as in a process that keeps what it frees, is left alone: asking would take longer than it saves.
inline void prepare_pages(const torch::stable::Tensor& result, int64_t element_size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge;
  const uintptr_t last = (begin + uintptr_t(result.numel() * element_size)) / huge * huge;
  if (first >= last || is_resident(first, last, huge)) return;
  if (madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) != 0) return;
  torch::stable::parallel_for(0, int64_t((last - first) / huge), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) *reinterpret_cast<volatile char*>(first + uintptr_t(i) * huge) = 0;
  });
#else
  (void)result;
  (void)element_size;
#endif
}

}  // namespace detr_family
