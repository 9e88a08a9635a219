// What the kernels of sums of outer products work on, the same for every instruction set.
#pragma once

#include <cstdint>

#include "stored.h"

namespace detr_family {

constexpr int32_t kHigh = 8, kWide = 32;  // of the sums that are kept in registers at a time

struct OuterProductKernels {
  // Rows from first to last of a (count x M) to M/8 x count x 8.
  void (*pack_left)(const float* a, int64_t m, int64_t count, int64_t first, int64_t last, float* packed);
  // 32 columns of b, at `row` floats a row: count x 32.
  void (*pack_right)(const float* b, int64_t row, int64_t count, float* packed);
  // 8 x 32 sums, at `row` floats a row, += the transpose of count x 8 times count x 32.
  void (*add)(const float* left, const float* right, int64_t count, float* sums, int64_t row);
};

}  // namespace detr_family
