// What the kernels of Winograd's convolutions work on: pointers and sizes, the same for every instruction set.
#pragma once

#include <cstdint>

#include "stored.h"

namespace detr_family {

constexpr int32_t kPositions = 36;  // of a tile of 6x6
constexpr int32_t kPanel = 32;      // channels of a result whose filters lie together: channels are multiples of it
constexpr int32_t kRows = 8;        // of the left matrix that a product takes at a time; tiles are padded to them

// A map of images, B x H x W x channels, whose 4x4 tiles are numbered image by image, row by row.
struct Map {
  int64_t height, width;
  int32_t channels;
  Stored stored;
  int64_t down, right;            // tiles
  const float* numbers = nullptr;  // one of these two
  const uint16_t* narrow = nullptr;
};

// Where a convolution's result goes, a map of the same size.
struct Result {
  int32_t channels;
  Stored stored;
  float* numbers = nullptr;  // one of these two
  uint16_t* narrow = nullptr;
  const float* bias = nullptr;  // channels
  bool add = false;             // to what is there, before ReLU
  bool relu = false;
};

// The kernels of one instruction set. `stride` is the number of floats from one of the 36 positions to the next.
struct WinogradKernels {
  // (O, I, 3, 3) to 36 x O/32 x I x 32; `backwards` turns them and swaps O and I: those of the gradient.
  // Panels from first to last.
  void (*filters)(const float* weight, int32_t out, int32_t in, bool backwards, float* transformed, int32_t first,
                  int32_t last);
  // 6x6 inputs of tiles: 36 x tiles x channels.
  void (*inputs)(const Map&, int64_t first, int64_t last, float* transformed, int64_t stride);
  // 4x4 gradients of results: 36 x O/32 x tiles x 32, `count` being the tiles that there is room for.
  void (*gradients)(const Map&, int64_t first, int64_t last, float* transformed, int64_t stride, int64_t count);
  // 36 x tiles x O to 4x4 results.
  void (*results)(const Map&, const Result&, int64_t first, int64_t last, const float* products, int64_t stride);
  // c (M x N, at `c_row` floats a row) = or += a (M x K) b: a's element (m, k) lies at m * a_row + k * a_column, b is
  // N/32 x K x 32; M a multiple of kRows, N of kPanel.
  void (*multiply)(const float* a, int64_t a_row, int64_t a_column, const float* b, float* c, int64_t c_row, int64_t m,
                   int64_t n, int64_t k, bool add);
  // Gradients of transformed filters, 36 x I x O, to those of (O, I, 3, 3): input channels from first to last.
  void (*filter_gradients)(const float* transformed, int32_t out, int32_t in, float* weight, int32_t first,
                           int32_t last);
};

}  // namespace detr_family
