// Multi-scale deformable attention on the CPU: checks, choice of instructions, threads, registration.
//
// Each head gathers from its own copy of the value (S x D instead of S x M*D, so that neighbouring tokens are
// neighbours in memory too), but for the levels where so few points lie that copying would cost more than it saves.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu_problem.h"
#include "instructions.h"
#include "pages.h"

#define DETR_KERNELS "cpu_kernels.inl"
#include "every_instruction_set.inl"

namespace detr_family {
namespace {

template <typename T>
Kernels<T> choose(int32_t channels) {
#if defined(DETR_X86)
  if (instructions() == Instructions::avx512) return avx512::kernels<T>(channels);
  if (instructions() == Instructions::avx2) return avx2::kernels<T>(channels);
#endif
  return generic::kernels<T>(channels);
}

// Below this many corners per token of a level a copy costs more than it saves; the backward writes one back, too.
constexpr int64_t kForwardCorners = 4, kBackwardCorners = 8;
constexpr int32_t kGroup = 4;  // points that the backward takes at once, at most: all copied or none

Stored stored(const Operands& in) {
  if (in.value_type == ScalarType::BFloat16) return Stored::bfloat16;
  return in.value_type == ScalarType::Half ? Stored::half : Stored::same;
}

template <typename T>
Problem<T> describe(const Operands& in, int64_t corners_per_token) {
  Problem<T> problem;
  problem.batch = in.batch;
  problem.tokens = in.tokens;
  problem.queries = in.queries;
  problem.heads = int32_t(in.heads);
  problem.channels = int32_t(in.channels);
  problem.levels = int32_t(in.levels);
  problem.points = int32_t(in.points);
  problem.shapes = static_cast<const int64_t*>(in.shapes.data_ptr());
  problem.starts = static_cast<const int64_t*>(in.starts.data_ptr());
  problem.stored = stored(in);
  if (problem.stored == Stored::same)
    problem.value = static_cast<const T*>(in.value.data_ptr());
  else
    problem.narrow_value = static_cast<const uint16_t*>(in.value.data_ptr());
  problem.numbers = static_cast<const T*>(in.numbers.data_ptr());
  problem.weights = static_cast<const T*>(in.weights.data_ptr());
  if (in.reference.has_value()) {
    problem.reference = static_cast<const T*>(in.reference->data_ptr());
    problem.reference_dims = int32_t(in.reference->size(3));
  }
  const int64_t corners = in.queries * in.points * 4;  // on each level
  if (problem.stored != Stored::same) return problem;  // all are copied: what is narrow is widened on the way
  problem.first_copied = problem.levels;
  for (int32_t l = problem.levels; l-- > 0;) {
    if (corners < corners_per_token * problem.shapes[2 * l] * problem.shapes[2 * l + 1]) break;
    problem.first_copied = l;
  }
  while (problem.first_copied < problem.levels && problem.first_copied * problem.points % kGroup != 0)
    ++problem.first_copied;
  return problem;
}

template <typename T>
void run_forward(Problem<T>& problem, void* output) {
  problem.output = static_cast<T*>(output);
  problem.narrow_output = static_cast<uint16_t*>(output);  // whichever it is
  const Kernels<T> kernels = choose<T>(problem.channels);
  const int64_t heads = problem.batch * problem.heads;
  if (heads == 0 || problem.queries == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pieces = std::min((threads + heads - 1) / heads, (problem.queries + 63) / 64);
  const int64_t step = (problem.queries + pieces - 1) / pieces;
  torch::stable::parallel_for(0, heads * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / pieces, first = task % pieces * step;
      kernels.forward(problem, head / problem.heads, int32_t(head % problem.heads), first,
                      std::min(first + step, problem.queries));
    }
  });
}

template <typename T>
void run_backward(Problem<T>& problem) {
  const Kernels<T> kernels = choose<T>(problem.channels);
  const int64_t heads = problem.batch * problem.heads;
  if (heads == 0) return;
  // Copies are written to every token of their levels; what is not copied is added to, and so must be zero.
  const int64_t added = problem.first_copied < problem.levels ? problem.starts[problem.first_copied] : problem.tokens;
  const int64_t token = int64_t(problem.heads) * problem.channels;
  torch::stable::parallel_for(0, problem.batch * added, 256, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / added, first = begin % added, count = std::min(end - begin, added - first);
      std::fill_n(problem.grad_value + (b * problem.tokens + first) * token, count * token, T(0));
      begin += count;
    }
  });
  // Levels share neither tokens nor points, so with more threads than heads they are tasks of their own.
  const bool by_level = torch::stable::get_num_threads() > heads && problem.levels > 1;
  const int64_t pieces = by_level ? problem.levels : 1;
  torch::stable::parallel_for(0, heads * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / pieces;
      const int32_t level = int32_t(task % pieces);
      kernels.backward(problem, head / problem.heads, int32_t(head % problem.heads), by_level ? level : 0,
                       by_level ? level + 1 : problem.levels);
    }
  });
  if (by_level && problem.reference != nullptr) {
    torch::stable::parallel_for(0, problem.queries * heads, 256, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(problem.levels * problem.points + 64 / sizeof(T));
      kernels.softmax_backward(problem, scratch.data(), begin, end);
    });
  }
}

Operands prepare(const Tensor& value, const Tensor& shapes, const Tensor& starts, const std::optional<Tensor>& reference,
                 const Tensor& numbers, const Tensor& weights, const Tensor* grad_output = nullptr) {
  check_devices([](const Tensor& tensor) { return tensor.is_cpu(); }, value, shapes, starts, reference, numbers, weights,
                grad_output);
  return check_cpu(check(value, shapes, starts, reference, numbers, weights));
}

int64_t size_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

Tensor forward(const Operands& in) {
  Tensor output = torch::stable::new_empty(in.value, {in.batch, in.queries, in.heads * in.channels});
  prepare_pages(output, size_of(in.value_type));
  if (in.compute == ScalarType::Double) {
    Problem<double> problem = describe<double>(in, kForwardCorners);
    run_forward(problem, output.data_ptr());
  } else {
    Problem<float> problem = describe<float>(in, kForwardCorners);
    run_forward(problem, output.data_ptr());
  }
  return output;
}

template <typename T>
void backward_of(const Operands& in, const Tensor& grad_output, Gradients& out) {
  Problem<T> problem = describe<T>(in, kBackwardCorners);
  problem.grad_output = static_cast<const T*>(grad_output.data_ptr());
  problem.grad_value = static_cast<T*>(out.value.data_ptr());
  problem.narrow_grad_value = static_cast<uint16_t*>(out.value.data_ptr());  // whichever it is
  problem.grad_numbers = static_cast<T*>(out.numbers.data_ptr());
  problem.grad_weights = static_cast<T*>(out.weights.data_ptr());
  run_backward(problem);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Operands& in, const Tensor& grad_output) {
  check_grad_output(in, grad_output);
  Tensor grad = cast(as_contiguous(grad_output), in.compute);
  Gradients out{torch::stable::empty_like(in.value), torch::stable::empty_like(in.numbers),
                torch::stable::empty_like(in.weights)};
  prepare_pages(out.value, size_of(in.value_type));
  for (const Tensor* result : {&out.numbers, &out.weights}) prepare_pages(*result, size_of(in.compute));
  if (in.compute == ScalarType::Double) {
    backward_of<double>(in, grad, out);
  } else {
    backward_of<float>(in, grad, out);
  }
  return {out.value, cast(out.numbers, in.numbers_type), cast(out.weights, in.weights_type)};
}

Tensor ms_deform_attn_forward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, bool) {
  return forward(prepare(value, shapes, starts, std::nullopt, locations, weights));
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor shapes,
                                                           Tensor starts, Tensor locations, Tensor weights, bool) {
  return backward(prepare(value, shapes, starts, std::nullopt, locations, weights, &grad_output), grad_output);
}

Tensor ms_deform_attn_fused_forward(Tensor value, Tensor shapes, Tensor starts, Tensor reference, Tensor offsets,
                                    Tensor logits, bool) {
  return forward(prepare(value, shapes, starts, reference, offsets, logits));
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, Tensor shapes,
                                                                 Tensor starts, Tensor reference, Tensor offsets,
                                                                 Tensor logits, bool) {
  return backward(prepare(value, shapes, starts, reference, offsets, logits, &grad_output), grad_output);
}

}  // namespace
}  // namespace detr_family

STABLE_TORCH_LIBRARY_IMPL(detr_family, CPU, m) {
  m.impl("ms_deform_attn_forward", TORCH_BOX(&detr_family::ms_deform_attn_forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&detr_family::ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&detr_family::ms_deform_attn_fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&detr_family::ms_deform_attn_fused_backward));
}

extern "C" DETR_EXPORT const char* detr_family_cpu_instructions() {
  switch (detr_family::instructions()) {
    case detr_family::Instructions::avx512: return "avx512";
    case detr_family::Instructions::avx2: return "avx2";
    default: return "generic";
  }
}
