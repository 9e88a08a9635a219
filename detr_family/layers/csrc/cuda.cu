// Multi-scale deformable attention on CUDA: checks, choice of kernel, launches, registration.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>

#include "checks.h"
#include "cuda_kernels.cuh"

// torch without CUDA lacks this function; the library is to load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace detr_family {
namespace {

constexpr int kExactChannels = 32;  // what all detectors of the family have; other numbers take the kernel for any
constexpr int kChunk = 16;
constexpr size_t kSharedAsOfRight = 48 << 10;
constexpr size_t kSharedUnasked = 1 << 10;  // what no kernel's own arrays leave too little room for: no question asked

// Variants of kernels that no GPU has decided about: bits, none of them on until somebody asks.
constexpr unsigned kCombine = 1, kThroughHeads = 2;
std::atomic<unsigned> variants{0};

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "ms_deform_attn: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "ms_deform_attn: ", cudaGetErrorString(error));
}

// A block has 48 KiB of shared memory unless more is asked for, and the kernel's own arrays are among them.
template <typename Kernel>
void allow_shared(Kernel kernel, size_t dynamic, const Params& params) {
  cudaFuncAttributes attributes;
  check_launch(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.sharedSizeBytes + dynamic <= kSharedAsOfRight) return;
  int device = 0, most = 0;
  check_launch(cudaGetDevice(&device));
  check_launch(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(attributes.sharedSizeBytes + dynamic <= size_t(most), "ms_deform_attn: ", params.levels, " levels of ",
                  params.points, " points need ", attributes.sharedSizeBytes + dynamic,
                  " bytes of shared memory, this device has ", most, ": take fewer points");
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic)));
}

template <typename Kernel>
void launch(Kernel kernel, int queries, const Params& params, cudaStream_t stream, int heads_of_block = 1) {
  const int64_t blocks = (params.queries + queries - 1) / queries;
  const int64_t heads = std::min<int64_t>((int64_t(params.batch) * params.heads + heads_of_block - 1) / heads_of_block, 65535);
  if (blocks == 0 || heads == 0) return;
  const size_t shared = sizeof(Level) * params.levels * params.points;
  if (shared > kSharedUnasked) allow_shared(kernel, shared, params);
  kernel<<<dim3(unsigned(blocks), unsigned(heads)), kThreads, shared, stream>>>(params);
  check_launch(cudaGetLastError());
}

enum class Task { forward, backward, deterministic_backward };

template <typename C>
void launch_task(Task task, const Params& params, cudaStream_t stream) {
  if constexpr (C::exact) {
    const unsigned chosen = params.tiled ? variants.load() : 0;  // the decoder has few queries, far from one another
    if (task == Task::forward && (chosen & kThroughHeads))
      return launch(forward_kernel<C, true>, C::queries, params, stream, kHeads);
    if (task == Task::backward && (chosen & kCombine))
      return launch(backward_kernel<C, Sums::combined>, C::queries, params, stream);
  }
  switch (task) {
    case Task::forward: return launch(forward_kernel<C, false>, C::queries, params, stream);
    case Task::backward: return launch(backward_kernel<C, Sums::each>, C::queries, params, stream);
    default: return launch(backward_kernel<C, Sums::fixed>, C::queries, params, stream);
  }
}

// V: the value's type, T: that of sums.
template <typename V, typename T>
void choose_kernel(Task task, const Params& params, bool fused, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(V);
  if constexpr (sizeof(V) <= 4) {
    if (params.channels == kExactChannels) {
      constexpr int group = kExactChannels / width;
      if (!fused) return launch_task<Config<V, T, T, width, group, true, false>>(task, params, stream);
      return launch_task<Config<V, T, V, width, group, true, true>>(task, params, stream);
    }
  }
  if constexpr (sizeof(V) >= 4) {
    if (!fused) return launch_task<Config<V, T, T, 1, 32, false, false>>(task, params, stream);
    return launch_task<Config<V, T, T, 1, 32, false, true>>(task, params, stream);
  }
}

void choose_type(Task task, const Operands& in, const Params& params, cudaStream_t stream) {
  const bool fused = in.reference.has_value();
  switch (in.value.scalar_type()) {
    case ScalarType::Double: return choose_kernel<double, double>(task, params, fused, stream);
    case ScalarType::Half: return choose_kernel<__half, float>(task, params, fused, stream);
    case ScalarType::BFloat16: return choose_kernel<__nv_bfloat16, float>(task, params, fused, stream);
    default: return choose_kernel<float, float>(task, params, fused, stream);
  }
}

// 16 bytes at a time are read only where addresses are multiples of 16.
Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

// Offsets and logits stay in the value's 16-bit type where the kernel takes them so.
bool is_narrow(const Tensor& value, bool fused, const Tensor& numbers, const Tensor& weights) {
  return fused && value.element_size() == 2 && value.dim() == 4 && value.size(3) == kExactChannels &&
         numbers.scalar_type() == value.scalar_type() && weights.scalar_type() == value.scalar_type() &&
         numbers.dim() == 6 && numbers.size(3) * numbers.size(4) <= kChunk;
}

Params describe(const Operands& in) {
  Params params{};
  params.value = in.value.data_ptr();
  params.shapes = static_cast<const int64_t*>(in.shapes.data_ptr());
  params.starts = static_cast<const int64_t*>(in.starts.data_ptr());
  params.numbers = in.numbers.data_ptr();
  params.weights = in.weights.data_ptr();
  if (in.reference.has_value()) {
    params.reference = in.reference->data_ptr();
    params.reference_dims = int32_t(in.reference->size(3));
  }
  params.tokens = in.tokens;
  params.queries = in.queries;
  params.batch = int32_t(in.batch);
  params.heads = int32_t(in.heads);
  params.channels = int32_t(in.channels);
  params.levels = int32_t(in.levels);
  params.points = int32_t(in.points);
  params.tiled = in.queries == in.tokens;
  return params;
}

Operands check_cuda(const Tensor& value, const Tensor& shapes, const Tensor& starts,
                    const std::optional<Tensor>& reference, const Tensor& numbers, const Tensor& weights, bool narrow) {
  Operands in = check(value, shapes, starts, reference, numbers, weights, narrow);
  // There are 16-bit kernels for D = 32, and fused ones where offsets and logits are 16-bit too.
  if (in.value.element_size() == 2 && (in.channels != kExactChannels || (reference.has_value() && !narrow)))
    in.value = cast(in.value, in.compute);
  STD_TORCH_CHECK(in.heads * in.channels < (int64_t(1) << 27), "ms_deform_attn: a token of ", in.heads, " heads of ",
                  in.channels, " channels is too wide");
  in.value = aligned(in.value);
  return in;
}

auto on_device_of(const Tensor& value) {
  return [index = value.get_device_index()](const Tensor& tensor) {
    return tensor.is_cuda() && tensor.get_device_index() == index;
  };
}

Tensor forward(const Tensor& value, const Tensor& shapes, const Tensor& starts, const std::optional<Tensor>& reference,
               const Tensor& numbers, const Tensor& weights) {
  check_devices(on_device_of(value), value, shapes, starts, reference, numbers, weights);
  const bool narrow = is_narrow(value, reference.has_value(), numbers, weights);
  torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Operands in = check_cuda(value, shapes, starts, reference, numbers, weights, narrow);
  Tensor output = torch::stable::new_empty(in.value, {in.batch, in.queries, in.heads * in.channels});
  Params params = describe(in);
  params.output = output.data_ptr();
  choose_type(Task::forward, in, params, current_stream(value));
  return cast(output, in.value_type);
}

void find_largest(const Tensor& tensor, unsigned* to, cudaStream_t stream) {
  const int64_t count = tensor.numel();
  if (count == 0) return;
  const unsigned blocks = unsigned(std::min<int64_t>((count + 1023) / 1024, 1024));
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      largest_kernel<<<blocks, 256, 0, stream>>>(static_cast<const double*>(tensor.data_ptr()), count, to);
      break;
    case ScalarType::Half:
      largest_kernel<<<blocks, 256, 0, stream>>>(static_cast<const __half*>(tensor.data_ptr()), count, to);
      break;
    case ScalarType::BFloat16:
      largest_kernel<<<blocks, 256, 0, stream>>>(static_cast<const __nv_bfloat16*>(tensor.data_ptr()), count, to);
      break;
    default:
      largest_kernel<<<blocks, 256, 0, stream>>>(static_cast<const float*>(tensor.data_ptr()), count, to);
  }
  check_launch(cudaGetLastError());
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value, const Tensor& shapes,
                                            const Tensor& starts, const std::optional<Tensor>& reference,
                                            const Tensor& numbers, const Tensor& weights, bool deterministic) {
  check_devices(on_device_of(value), value, shapes, starts, reference, numbers, weights, &grad_output);
  const bool narrow = is_narrow(value, reference.has_value(), numbers, weights);
  torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Operands in = check_cuda(value, shapes, starts, reference, numbers, weights, narrow);
  check_grad_output(in, grad_output);
  const Tensor grad = aligned(cast(as_contiguous(grad_output), in.value.scalar_type()));
  const cudaStream_t stream = current_stream(value);
  Params params = describe(in);
  params.grad_output = grad.data_ptr();
  Tensor grad_numbers = torch::stable::empty_like(in.numbers);
  Tensor grad_weights = torch::stable::empty_like(in.weights);
  params.grad_numbers = grad_numbers.data_ptr();
  params.grad_weights = grad_weights.data_ptr();
  const auto shape = {in.batch, in.tokens, in.heads, in.channels};
  Tensor grad_value;
  if (!deterministic) {
    grad_value = torch::stable::new_zeros(in.value, shape, in.compute);
    params.grad_value = grad_value.data_ptr();
    choose_type(Task::backward, in, params, stream);
  } else {
    grad_value = torch::stable::new_zeros(in.value, shape, in.compute);
    Tensor sums = torch::stable::new_zeros(in.value, shape, ScalarType::Long);
    Tensor limits = torch::stable::new_zeros(in.value, {2}, ScalarType::Int);
    unsigned* limit = static_cast<unsigned*>(limits.data_ptr());
    params.grad_value = grad_value.data_ptr();
    params.sums = static_cast<int64_t*>(sums.data_ptr());
    params.limits = limit;
    find_largest(grad, limit, stream);
    if (in.reference.has_value()) {  // a softmax gives no more than 1, whose bits these are
      check_launch(cudaMemsetAsync(reinterpret_cast<char*>(limit + 1) + 3, 0x3f, 1, stream));
      check_launch(cudaMemsetAsync(reinterpret_cast<char*>(limit + 1) + 2, 0x80, 1, stream));
    } else {
      find_largest(in.weights, limit + 1, stream);
    }
    choose_type(Task::deterministic_backward, in, params, stream);
    const int64_t count = grad_value.numel(), most = in.queries * in.levels * in.points;
    if (count > 0) {
      const unsigned blocks = unsigned(std::min<int64_t>((count + 1023) / 1024, 4096));
      const int64_t* from = static_cast<const int64_t*>(sums.data_ptr());
      if (in.compute == ScalarType::Double) {
        from_fixed_kernel<<<blocks, 256, 0, stream>>>(from, static_cast<double*>(grad_value.data_ptr()), count, limit, most);
      } else {
        from_fixed_kernel<<<blocks, 256, 0, stream>>>(from, static_cast<float*>(grad_value.data_ptr()), count, limit, most);
      }
      check_launch(cudaGetLastError());
    }
  }
  return {cast(grad_value, in.value_type), cast(grad_numbers, in.numbers_type), cast(grad_weights, in.weights_type)};
}

Tensor ms_deform_attn_forward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, bool) {
  return forward(value, shapes, starts, std::nullopt, locations, weights);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor shapes,
                                                           Tensor starts, Tensor locations, Tensor weights,
                                                           bool deterministic) {
  return backward(grad_output, value, shapes, starts, std::nullopt, locations, weights, deterministic);
}

Tensor ms_deform_attn_fused_forward(Tensor value, Tensor shapes, Tensor starts, Tensor reference, Tensor offsets,
                                    Tensor logits, bool) {
  return forward(value, shapes, starts, reference, offsets, logits);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, Tensor shapes,
                                                                 Tensor starts, Tensor reference, Tensor offsets,
                                                                 Tensor logits, bool deterministic) {
  return backward(grad_output, value, shapes, starts, reference, offsets, logits, deterministic);
}

}  // namespace
}  // namespace detr_family

STABLE_TORCH_LIBRARY_IMPL(detr_family, CUDA, m) {
  m.impl("ms_deform_attn_forward", TORCH_BOX(&detr_family::ms_deform_attn_forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&detr_family::ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&detr_family::ms_deform_attn_fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&detr_family::ms_deform_attn_fused_backward));
}

extern "C" DETR_EXPORT const char* detr_family_cuda_arches() { return DETR_FAMILY_ARCHES; }

// Which variants of kernels to take from now on (kCombine, kThroughHeads); returns which were taken before.
extern "C" DETR_EXPORT unsigned detr_family_cuda_variants(unsigned chosen) { return detr_family::variants.exchange(chosen); }

// Why kernels of this library would not start on a device, as the end of a sentence about it; "" where they do. It asks
// without starting any, so that nothing is left behind: the runtime in here may be of a later CUDA than the driver.
extern "C" DETR_EXPORT const char* detr_family_cuda_problem(int device) {
  static thread_local std::string problem;
  problem.clear();
  const auto text = [](int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); };
  int driver = 0, before = 0;
  const cudaError_t asked = cudaDriverGetVersion(&driver);
  if (asked == cudaSuccess && driver / 1000 < CUDART_VERSION / 1000) {  // within a major version any minor one serves
    problem = "was built by CUDA " + text(CUDART_VERSION) + ", the driver serves no later than " + text(driver) +
              ": update the driver, or build with a toolkit of CUDA " + text(driver) + " or earlier";
    return problem.c_str();
  }
  cudaFuncAttributes attributes;
  cudaError_t error = asked;
  if (error == cudaSuccess) error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, detr_family::from_fixed_kernel<float>);
    cudaSetDevice(before);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be blamed for it
    problem = std::string("does not start on this device: ") + cudaGetErrorString(error) + " (it was built by CUDA " +
              text(CUDART_VERSION) + ", the driver serves " + text(driver) + ")";
  }
  return problem.c_str();
}
