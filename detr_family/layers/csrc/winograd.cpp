// 3x3 convolutions on the CPU by Winograd's method: checks, threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "instructions.h"
#include "tensors.h"
#include "winograd_problem.h"

#define DETR_KERNELS "winograd_kernels.inl"
#include "every_instruction_set.inl"

namespace detr_family {
namespace {

// Tiles that are worked on at a time, by each thread or for the gradient of filters by all of them: more of them and
// their 36 values of each channel leave the cache, fewer and the filters are read too often.
constexpr int64_t kTiles = 32, kGradientTiles = 192;
constexpr int64_t kApart = 16;  // floats between two positions, lest all 36 share a place in the cache

WinogradKernels choose_kernels() {
#if defined(DETR_X86)
  if (instructions() == Instructions::avx512) return avx512::winograd_kernels();
  if (instructions() == Instructions::avx2) return avx2::winograd_kernels();
#endif
  return generic::winograd_kernels();
}

int64_t rounded_up(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

void check_channels(const char* name, int64_t channels) {
  STD_TORCH_CHECK(channels > 0 && channels % kPanel == 0, "winograd: ", name, " has ", channels,
                  " channels, not a multiple of ", kPanel);
}

Map map_of(const char* name, const Tensor& tensor) {
  check_tensor("winograd", name, tensor, 4);
  check_channels(name, tensor.size(3));
  Map map{tensor.size(1), tensor.size(2), int32_t(tensor.size(3)), Stored::same, 0, 0};
  map.down = (map.height + 3) / 4;
  map.right = (map.width + 3) / 4;
  if (tensor.scalar_type() == ScalarType::BFloat16) {
    map.stored = Stored::bfloat16;
    map.narrow = static_cast<const uint16_t*>(tensor.data_ptr());
  } else {
    check_float("winograd", name, tensor);
    map.numbers = static_cast<const float*>(tensor.data_ptr());
  }
  return map;
}

// (O, I, 3, 3) float32 -> 36 x O/32 x I x 32, or of the gradient's filters 36 x I/32 x O x 32.
Tensor filters(Tensor weight, bool backwards) {
  check_tensor("winograd", "weight", weight, 4);
  check_float("winograd", "weight", weight);
  STD_TORCH_CHECK(weight.size(2) == 3 && weight.size(3) == 3, "winograd: filters must be 3x3");
  const int32_t out = int32_t(weight.size(0)), in = int32_t(weight.size(1));
  check_channels("weight", out);
  check_channels("weight", in);
  const int64_t panels = (backwards ? in : out) / kPanel, deep = backwards ? out : in;
  Tensor result = torch::stable::new_empty(weight, {kPositions, panels, deep, kPanel});
  prepare_pages(result, sizeof(float));
  const WinogradKernels kernels = choose_kernels();
  torch::stable::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    kernels.filters(data(weight), out, in, backwards, data(result), int32_t(first), int32_t(last));
  });
  return result;
}

// Convolves into a new tensor or, where `sums` is given, adds to that.
Tensor convolve_into(const Tensor* sums, const Tensor& x, const Tensor& filters, const std::optional<Tensor>& bias,
                     bool relu) {
  const Map map = map_of("x", x);
  check_tensor("winograd", "filters", filters, 4);
  check_float("winograd", "filters", filters);
  STD_TORCH_CHECK(filters.size(0) == kPositions && filters.size(2) == map.channels && filters.size(3) == kPanel,
                  "winograd: the filters are for other channels than x has");
  Result result{int32_t(filters.size(1) * kPanel), map.stored};
  result.relu = relu;
  if (bias.has_value()) {
    check_tensor("winograd", "bias", *bias, 1);
    check_float("winograd", "bias", *bias);
    STD_TORCH_CHECK(bias->size(0) == result.channels, "winograd: the bias is for other channels than the filters");
    result.bias = data(*bias);
  }
  if (sums != nullptr) {
    const Map of_sums = map_of("sums", *sums);
    STD_TORCH_CHECK(sums->size(0) == x.size(0) && of_sums.height == map.height && of_sums.width == map.width &&
                        of_sums.channels == result.channels && of_sums.stored == map.stored,
                    "winograd: sums must have the shape and the type of the result");
    const char* const first = static_cast<const char*>(sums->data_ptr());
    const char* const other = static_cast<const char*>(x.data_ptr());
    const int64_t size = map.stored == Stored::same ? 4 : 2;
    STD_TORCH_CHECK(first + sums->numel() * size <= other || other + x.numel() * size <= first,
                    "winograd: sums must not share memory with x, which is still read as they are written");
    result.add = true;
  }
  Tensor y = sums != nullptr ? *sums
                             : torch::stable::new_empty(x, {x.size(0), map.height, map.width, result.channels});
  if (map.stored == Stored::same)
    result.numbers = data(y);
  else
    result.narrow = static_cast<uint16_t*>(y.data_ptr());
  const int64_t tiles = x.size(0) * map.down * map.right;
  if (tiles == 0) return y;

  const WinogradKernels kernels = choose_kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t strips = std::max((tiles + kTiles - 1) / kTiles, std::min(threads, (tiles + kRows - 1) / kRows));
  const int64_t count = rounded_up((tiles + strips - 1) / strips, kRows);
  const int64_t in_stride = count * map.channels + kApart, out_stride = count * result.channels + kApart;
  const int64_t room = kPositions * (in_stride + out_stride);
  const int64_t workers = std::min(threads, strips);
  Tensor scratch = torch::stable::new_zeros(x, {workers, room}, ScalarType::Float);  // zeros: what pads the last strip
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      float* inputs = data(scratch) + worker * room;
      float* products = inputs + kPositions * in_stride;
      for (int64_t first = worker * count; first < tiles; first += workers * count) {
        const int64_t last = std::min(first + count, tiles);
        kernels.inputs(map, first, last, inputs, in_stride);
        for (int32_t p = 0; p < kPositions; ++p) {
          kernels.multiply(inputs + p * in_stride, map.channels, 1,
                           data(filters) + int64_t(p) * map.channels * result.channels, products + p * out_stride,
                           result.channels, rounded_up(last - first, kRows), result.channels, map.channels, false);
        }
        kernels.results(map, result, first, last, products, out_stride);
      }
    }
  });
  return y;
}

// x: B x H x W x I; filters: 36 x O/32 x I x 32; bias: O -> B x H x W x O of x's type.
Tensor convolve(Tensor x, Tensor filters, std::optional<Tensor> bias, bool relu) {
  return convolve_into(nullptr, x, filters, bias, relu);
}

// The same, added to `sums`, which has the result's shape and type, before ReLU.
Tensor add(Tensor sums, Tensor x, Tensor filters, std::optional<Tensor> bias, bool relu) {
  return convolve_into(&sums, x, filters, bias, relu);
}

// grad: B x H x W x O; x: B x H x W x I, both float32 -> (O, I, 3, 3).
Tensor filter_gradients(Tensor grad, Tensor x) {
  const Map of_grad = map_of("grad", grad), of_x = map_of("x", x);
  STD_TORCH_CHECK(of_grad.stored == Stored::same && of_x.stored == Stored::same, "winograd: gradients are of float32");
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && of_grad.height == of_x.height && of_grad.width == of_x.width,
                  "winograd: the gradient is of another size than x");
  const int32_t in = of_x.channels, out = of_grad.channels;
  const int64_t tiles = x.size(0) * of_x.down * of_x.right;
  Tensor result = torch::stable::new_empty(x, {out, in, 3, 3});
  if (tiles == 0) return torch::stable::zero_(result);

  const WinogradKernels kernels = choose_kernels();
  const int64_t strips = (tiles + kGradientTiles - 1) / kGradientTiles;
  const int64_t count = (tiles + strips - 1) / strips;
  const int64_t in_stride = count * in + kApart, out_stride = count * out + kApart;
  Tensor inputs = floats(x, kPositions * in_stride), gradients = floats(x, kPositions * out_stride);
  Tensor sums = floats(x, int64_t(kPositions) * in * out);
  for (int64_t first = 0; first < tiles; first += count) {
    const int64_t last = std::min(first + count, tiles);
    torch::stable::parallel_for(first, last, kRows, [&](int64_t begin, int64_t end) {
      kernels.inputs(of_x, begin, end, data(inputs) + (begin - first) * in, in_stride);
      kernels.gradients(of_grad, begin, end, data(gradients) + (begin - first) * kPanel, out_stride, last - first);
    });
    torch::stable::parallel_for(0, kPositions, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        kernels.multiply(data(inputs) + p * in_stride, 1, in, data(gradients) + p * out_stride,
                         data(sums) + p * in * out, out, in, out, last - first, first > 0);
      }
    });
  }
  torch::stable::parallel_for(0, in, kPanel, [&](int64_t begin, int64_t end) {
    kernels.filter_gradients(data(sums), out, in, data(result), int32_t(begin), int32_t(end));
  });
  return result;
}

}  // namespace
}  // namespace detr_family

STABLE_TORCH_LIBRARY_IMPL(detr_family, CPU, m) {
  m.impl("winograd_filters", TORCH_BOX(&detr_family::filters));
  m.impl("winograd_convolve", TORCH_BOX(&detr_family::convolve));
  m.impl("winograd_add_", TORCH_BOX(&detr_family::add));
  m.impl("winograd_filter_gradients", TORCH_BOX(&detr_family::filter_gradients));
}
