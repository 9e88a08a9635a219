// What the operators of dense layers ask of their tensors, which the Python functions have made so.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "pages.h"

namespace detr_family {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_tensor(const char* operation, const char* name, const Tensor& tensor, int64_t dims) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.dim() == dims, operation, ": ", name,
                  " must be contiguous, on the CPU, and of ", dims, " dimensions");
}

inline void check_float(const char* operation, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, operation, ": ", name, " must be float32, not ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// Room for so many floats.
inline Tensor floats(const Tensor& like, int64_t count) {
  Tensor result = torch::stable::new_empty(like, {count}, ScalarType::Float);
  prepare_pages(result, sizeof(float));
  return result;
}

}  // namespace detr_family
