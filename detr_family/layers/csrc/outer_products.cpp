// Sums of outer products on the CPU, which gradients of weights are: checks, threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "instructions.h"
#include "outer_products_problem.h"
#include "tensors.h"

#define DETR_KERNELS "outer_products_kernels.inl"
#include "every_instruction_set.inl"

namespace detr_family {
namespace {

constexpr int64_t kDeep = 384;  // rows that are worked on at a time: 32 columns of them are in the cache, and stay
constexpr int64_t kLine = 16;   // floats that are fetched together

OuterProductKernels choose_kernels() {
#if defined(DETR_X86)
  if (instructions() == Instructions::avx512) return avx512::outer_product_kernels();
  if (instructions() == Instructions::avx2) return avx2::outer_product_kernels();
#endif
  return generic::outer_product_kernels();
}

// sums (M x N) += the transpose of a (K x M) times b (K x N), all float32; M a multiple of 8, N of 32.
Tensor add(Tensor sums, Tensor a, Tensor b) {
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor*>{"sums", &sums}, {"a", &a}, {"b", &b}}) {
    check_tensor("outer products", name, *tensor, 2);
    check_float("outer products", name, *tensor);
  }
  const int64_t m = sums.size(0), n = sums.size(1), k = a.size(0);
  STD_TORCH_CHECK(a.size(1) == m && b.size(1) == n && b.size(0) == k, "outer products: a (", k, " x ", a.size(1),
                  ") and b (", b.size(0), " x ", b.size(1), ") have no product of ", m, " x ", n);
  STD_TORCH_CHECK(m % kHigh == 0 && n % kWide == 0, "outer products: ", m, " x ", n, " is not a multiple of ", kHigh,
                  " x ", kWide);
  if (m * n * k == 0) return sums;
  const OuterProductKernels kernels = choose_kernels();
  const int64_t deep = std::min(k, kDeep), workers = std::min<int64_t>(torch::stable::get_num_threads(), n / kWide);
  Tensor left = floats(a, deep * m), rights = floats(a, workers * deep * kWide);
  for (int64_t first = 0; first < k; first += deep) {
    const int64_t count = std::min(deep, k - first);
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      kernels.pack_left(data(a) + first * m, m, count, begin, end, data(left));
    });
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        float* const right = data(rights) + worker * deep * kWide;
        for (int64_t column = worker * kWide; column < n; column += workers * kWide) {
          kernels.pack_right(data(b) + first * n + column, n, count, right);
          // What is packed next is fetched into the second cache meanwhile.
          const bool more = column + workers * kWide < n;
          const int64_t next_row = more ? first : first + deep;
          const int64_t rows = std::min(deep, k - next_row), at_once = std::max<int64_t>(rows, 0) * kHigh / m + 1;
          const float* const next = data(b) + next_row * n + (more ? column + workers * kWide : worker * kWide);
          int64_t fetched = 0;
          for (int64_t i = 0; i < m; i += kHigh) {
            for (const int64_t stop = std::min(fetched + at_once, rows); fetched < stop; ++fetched)
              for (int64_t j = 0; j < kWide; j += kLine) __builtin_prefetch(next + fetched * n + j, 0, 2);
            kernels.add(data(left) + i * count, right, count, data(sums) + i * n + column, n);
          }
        }
      }
    });
  }
  return sums;
}

}  // namespace
}  // namespace detr_family

STABLE_TORCH_LIBRARY_IMPL(detr_family, CPU, m) { m.impl("add_outer_products_", TORCH_BOX(&detr_family::add)); }
