// What both libraries of deformable attention do before a kernel runs: shapes, types, contiguity. The Python function has checked what its
// caller sees; this keeps a direct call of torch.ops.detr_family from reading where nothing is.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#if defined(_WIN32)
#define DETR_EXPORT __declspec(dllexport)
#else
#define DETR_EXPORT __attribute__((visibility("default")))
#endif

namespace detr_family {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The operands, contiguous and of the type that is computed with; `value` may be of 16 bits.
struct Operands {
  Tensor value;                     // B x S x M x D
  Tensor shapes, starts;            // L x 2 and L, int64
  std::optional<Tensor> reference;  // B x Q x L x (2 or 4): the fused form
  Tensor numbers;                   // B x Q x M x L x P x 2: locations, or offsets in the fused form
  Tensor weights;                   // B x Q x M x L x P: attention weights, or logits
  int64_t batch, tokens, heads, channels, queries, levels, points;
  ScalarType value_type, numbers_type, weights_type, compute;
};

struct Gradients {
  Tensor value, numbers, weights;
};

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor cast(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) fits = fits && tensor.size(i++) == size;
  STD_TORCH_CHECK(fits, "ms_deform_attn: the shape of ", name, " does not fit those of value and spatial_shapes");
}

inline void check_floating(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "ms_deform_attn: ", name, " must be float32, float64, float16 or bfloat16, not ",
                  torch::headeronly::toString(type));
}

inline Operands check(const Tensor& value, const Tensor& shapes, const Tensor& starts,
                      const std::optional<Tensor>& reference, const Tensor& numbers, const Tensor& weights,
                      bool narrow = false) {  // narrow: offsets and logits are taken as they come
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must be (B, S, M, D)");
  STD_TORCH_CHECK(numbers.dim() == 6, "ms_deform_attn: locations or offsets must be (B, Q, M, L, P, 2)");
  check_floating("value", value);
  check_floating("locations or offsets", numbers);
  check_floating("weights or logits", weights);
  Operands in;
  in.batch = value.size(0);
  in.tokens = value.size(1);
  in.heads = value.size(2);
  in.channels = value.size(3);
  in.queries = numbers.size(1);
  in.levels = numbers.size(3);
  in.points = numbers.size(4);
  check_shape("locations or offsets", numbers, {in.batch, in.queries, in.heads, in.levels, in.points, 2});
  check_shape("weights or logits", weights, {in.batch, in.queries, in.heads, in.levels, in.points});
  check_shape("spatial_shapes", shapes, {in.levels, 2});
  check_shape("level_start_index", starts, {in.levels});
  STD_TORCH_CHECK(shapes.scalar_type() == ScalarType::Long && starts.scalar_type() == ScalarType::Long,
                  "ms_deform_attn: spatial_shapes and level_start_index must be int64");
  STD_TORCH_CHECK(in.tokens < (int64_t(1) << 27) && in.levels * in.points > 0,
                  "ms_deform_attn: there must be a point, and fewer than 2^27 tokens");
  in.value_type = value.scalar_type();
  in.numbers_type = numbers.scalar_type();
  in.weights_type = weights.scalar_type();
  in.compute = in.value_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  in.shapes = as_contiguous(shapes);
  in.starts = as_contiguous(starts);
  in.value = as_contiguous(value);
  in.numbers = cast(as_contiguous(numbers), narrow ? in.numbers_type : in.compute);
  in.weights = cast(as_contiguous(weights), narrow ? in.weights_type : in.compute);
  if (reference.has_value()) {
    check_floating("reference_points", *reference);
    STD_TORCH_CHECK(reference->dim() == 4 && (reference->size(3) == 2 || reference->size(3) == 4),
                    "ms_deform_attn: reference_points must be (B, Q, L, 2 or 4)");
    check_shape("reference_points", *reference, {in.batch, in.queries, in.levels, reference->size(3)});
    in.reference = cast(as_contiguous(*reference), in.compute);
  }
  return in;
}

// The output's gradient: of its shape, in the type of the sums or any other, on the device of value.
inline void check_grad_output(const Operands& in, const Tensor& grad_output) {
  check_floating("grad_output", grad_output);
  check_shape("grad_output", grad_output, {in.batch, in.queries, in.heads * in.channels});
}

// Where nothing is, nothing is read: every operand on the one device that the kernels run on.
template <typename OnDevice>
void check_devices(OnDevice on_device, const Tensor& value, const Tensor& shapes, const Tensor& starts,
                   const std::optional<Tensor>& reference, const Tensor& numbers, const Tensor& weights,
                   const Tensor* grad_output = nullptr) {
  const bool same = on_device(value) && on_device(shapes) && on_device(starts) && on_device(numbers) &&
                    on_device(weights) && (!reference.has_value() || on_device(*reference)) &&
                    (grad_output == nullptr || on_device(*grad_output));
  STD_TORCH_CHECK(same, "ms_deform_attn: all tensors must be on the device of value");
}

// On the CPU the levels can be read.
inline Operands check_cpu(Operands in) {
  const int64_t* shapes = static_cast<const int64_t*>(in.shapes.data_ptr());
  const int64_t* starts = static_cast<const int64_t*>(in.starts.data_ptr());
  int64_t next = 0;
  for (int64_t l = 0; l < in.levels; ++l) {
    STD_TORCH_CHECK(shapes[2 * l] > 0 && shapes[2 * l + 1] > 0 && starts[l] == next,
                    "ms_deform_attn: level ", l, " of spatial_shapes is empty, or does not start at token ", next);
    next += shapes[2 * l] * shapes[2 * l + 1];
  }
  STD_TORCH_CHECK(next == in.tokens, "ms_deform_attn: spatial_shapes are ", next, " tokens, value has ", in.tokens);
  return in;
}

}  // namespace detr_family
