// What the CPU kernels work on: pointers and sizes, the same for every instruction set.
#pragma once

#include <cstdint>

#include "stored.h"

namespace detr_family {

// T is float or double; everything is contiguous but for `value` and `grad_value`, whose token (b, m, s) begins at
// b * batch_stride + m * head_stride + s * row_stride.
template <typename T>
struct Problem {
  int64_t batch, tokens, queries;     // B, S, Q
  int32_t heads, channels;            // M, D
  int32_t levels, points;             // L, P
  const int64_t* shapes;              // L x 2 (height, width)
  const int64_t* starts;              // L
  const T* value;                     // B x S x M x D
  const T* numbers;                   // B x Q x M x L x P x 2: locations, or offsets where `reference` is given
  const T* weights;                   // B x Q x M x L x P: attention weights, or logits
  const T* reference = nullptr;       // B x Q x L x (2 or 4)
  int32_t reference_dims = 0;
  int32_t first_copied = 0;           // from this level on a head gathers from a copy of its own; L for none
  T* output = nullptr;                // B x Q x M*D
  Stored stored = Stored::same;       // else these three take the place of value, output and grad_value (of T = float),
                                      // and all levels are copied: copies are of T
  const uint16_t* narrow_value = nullptr;
  uint16_t* narrow_output = nullptr;
  uint16_t* narrow_grad_value = nullptr;
  const T* grad_output = nullptr;     // B x Q x M*D
  T* grad_value = nullptr;            // B x S x M x D; levels before first_copied zeroed by the caller
  T* grad_numbers = nullptr;          // as numbers
  T* grad_weights = nullptr;          // as weights; until softmax_backward has run, of the softmax's output
};

// The kernels of one instruction set. A task is one head (b, m), and of that some queries (forward) or some levels
// (backward), so that no two tasks write to the same place.
template <typename T>
struct Kernels {
  void (*forward)(const Problem<T>&, int64_t b, int32_t m, int64_t query_begin, int64_t query_end);
  void (*backward)(const Problem<T>&, int64_t b, int32_t m, int32_t level_begin, int32_t level_end);
  // rows: B*Q*M; scratch: L*P rounded up to 64 bytes
  void (*softmax_backward)(const Problem<T>&, T* scratch, int64_t row_begin, int64_t row_end);
};

}  // namespace detr_family
