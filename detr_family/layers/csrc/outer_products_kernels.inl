// The kernels of sums of outer products in terms of vectors; see every_instruction_set.inl.

#include "vectors.inl"

static constexpr int kLanes = Simd<float>::lanes;

static void pack_left(const float* a, int64_t m, int64_t count, int64_t first, int64_t last, float* packed) {
  for (int64_t k = first; k < last; ++k)
    for (int64_t i = 0; i < m; i += kHigh)
      __builtin_memcpy(packed + i * count + k * kHigh, a + k * m + i, kHigh * sizeof(float));
}

static void pack_right(const float* b, int64_t row, int64_t count, float* packed) {
  for (int64_t k = 0; k < count; ++k) __builtin_memcpy(packed + k * kWide, b + k * row, kWide * sizeof(float));
}

static void add(const float* __restrict left, const float* __restrict right, int64_t count, float* __restrict sums,
                int64_t row) {
  constexpr int high = VECTOR_BYTES == 64 ? 8 : 4;  // as many as there are registers for
  for (int i = 0; i < kHigh; ++i)
    for (int j = 0; j < kWide; j += 16) __builtin_prefetch(sums + i * row + j, 1);
  for (int top = 0; top < kHigh; top += high) {
    for (int lane = 0; lane < kWide; lane += 2 * kLanes) {
      Floats kept[high][2];
      for (int i = 0; i < high; ++i) kept[i][0] = kept[i][1] = Floats{};
      for (int64_t k = 0; k < count; ++k) {
        const Floats wide[2] = {at(right + k * kWide + lane), at(right + k * kWide + lane + kLanes)};
        for (int i = 0; i < high; ++i) {
          const Floats one = left[k * kHigh + top + i] - Floats{};  // minus, for x - 0 is x and is left out
          for (int j = 0; j < 2; ++j) kept[i][j] += one * wide[j];
        }
      }
      for (int i = 0; i < high; ++i)
        for (int j = 0; j < 2; ++j) at(sums + (top + i) * row + lane + j * kLanes) += kept[i][j];
    }
  }
}

static OuterProductKernels outer_product_kernels() { return {pack_left, pack_right, add}; }
