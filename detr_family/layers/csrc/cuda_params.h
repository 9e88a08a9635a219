// What the CUDA kernels work on; passed by value.
#pragma once

#include <cstdint>

namespace detr_family {

struct Params {
  const void* value;          // B x S x M x D
  const int64_t* shapes;      // L x 2 (height, width), on the device
  const int64_t* starts;      // L, on the device
  const void* reference;      // B x Q x L x (2 or 4): the fused form
  const void* numbers;        // B x Q x M x L x P x 2: locations, or offsets in the fused form
  const void* weights;        // B x Q x M x L x P: attention weights, or logits
  void* output;               // B x Q x M*D
  const void* grad_output;    // B x Q x M*D
  void* grad_value;           // B x S x M x D
  int64_t* sums;              // deterministic: B x S x M x D in fixed point; grad_value then takes what does not fit
  void* grad_numbers;         // as numbers
  void* grad_weights;         // as weights
  const unsigned* limits;     // deterministic: bits of the largest finite |grad_output| and |weight|
  int64_t tokens, queries;    // S, Q
  int32_t batch, heads, channels, levels, points;  // B, M, D, L, P
  int32_t reference_dims;
  bool tiled;                 // the queries are the tokens: take them in tiles of neighbours
};

}  // namespace detr_family
