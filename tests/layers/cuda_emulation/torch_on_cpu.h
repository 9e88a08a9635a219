// What the CUDA sources need of torch's stable ABI, without torch: the random check runs under sanitizers, which torch's
// own libraries were not built for, and wants every buffer to be exactly as long as was asked for.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

using AOTITorchError = int32_t;

namespace torch::headeronly {
enum class ScalarType { Float, Double, Half, BFloat16, Long, Int };
inline const char* toString(ScalarType) { return "a type"; }
}  // namespace torch::headeronly

namespace emu {
void convert(const void* from, torch::headeronly::ScalarType, void* to, torch::headeronly::ScalarType, int64_t count);

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
}  // namespace emu

#define STD_TORCH_CHECK(...) emu::check(__VA_ARGS__)
#define TORCH_ERROR_CODE_CHECK(call) emu::check((call) == 0, "a call of torch failed")
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void register_##key(emu::Library& m)
#define TORCH_BOX(function) (function)

namespace emu {
struct Library {
  template <typename F>
  void impl(const char*, F) {}
};
}  // namespace emu

namespace torch::stable {
using headeronly::ScalarType;
using Sizes = std::initializer_list<int64_t>;

inline size_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 4;
  }
}

class Tensor {
 public:
  Tensor() = default;
  // `skip`: so many numbers beyond an address that is a multiple of 16. NaN: what nobody writes shows.
  Tensor(std::vector<int64_t> sizes, ScalarType type, size_t skip = 0) : sizes_(std::move(sizes)), type_(type) {
    const size_t offset = skip * bytes_of(type), bytes = offset + size_t(numel()) * bytes_of(type);
    void* block = nullptr;
    if (posix_memalign(&block, 16, bytes ? bytes : 1)) std::abort();
    std::memset(block, 0xff, bytes);
    block_ = std::shared_ptr<void>(block, std::free);
    data_ = static_cast<char*>(block) + offset;
  }
  void* data_ptr() const { return data_; }
  int64_t dim() const { return int64_t(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_.at(size_t(i)); }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  int64_t numel() const { return std::accumulate(sizes_.begin(), sizes_.end(), int64_t(1), std::multiplies<int64_t>()); }
  ScalarType scalar_type() const { return type_; }
  size_t element_size() const { return bytes_of(type_); }
  bool is_contiguous() const { return true; }
  bool is_cpu() const { return true; }
  int32_t get_device_index() const { return 0; }

 private:
  std::vector<int64_t> sizes_;
  ScalarType type_ = ScalarType::Float;
  std::shared_ptr<void> block_;
  void* data_ = nullptr;
};

inline Tensor contiguous(const Tensor& tensor) { return tensor; }
inline Tensor empty_like(const Tensor& tensor) { return Tensor(tensor.sizes(), tensor.scalar_type()); }
inline Tensor clone(const Tensor& tensor) {
  Tensor made = empty_like(tensor);
  std::memcpy(made.data_ptr(), tensor.data_ptr(), size_t(tensor.numel()) * tensor.element_size());
  return made;
}
inline Tensor new_empty(const Tensor& tensor, Sizes sizes, std::optional<ScalarType> type = std::nullopt) {
  return Tensor(sizes, type.value_or(tensor.scalar_type()));
}
inline Tensor new_zeros(const Tensor& tensor, Sizes sizes, std::optional<ScalarType> type = std::nullopt) {
  Tensor made = new_empty(tensor, sizes, type);
  std::memset(made.data_ptr(), 0, size_t(made.numel()) * made.element_size());
  return made;
}
inline Tensor to(const Tensor& tensor, ScalarType type) {
  Tensor made(tensor.sizes(), type);
  emu::convert(tensor.data_ptr(), tensor.scalar_type(), made.data_ptr(), type, tensor.numel());
  return made;
}
}  // namespace torch::stable
