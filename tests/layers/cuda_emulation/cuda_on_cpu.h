// What the CUDA sources need of CUDA, on a CPU: a block's threads are fibers; barriers, shuffles and atomics are real.
//
// Every collective checks that all threads it waits for come to the same one; a thread that ends early, or two different
// collectives, end the run with a message. Threads run in random order between collectives. Under -fsanitize=thread the
// only order between threads is that of __syncthreads and __syncwarp (a shuffle orders no memory), so a race is found
// whatever the order of running was.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emu {
template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to{};
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emu

// ------------------------------------------------------------------------------------------------ 16-bit numbers
struct __half {
  uint16_t x = 0;
  __half() = default;
  explicit __half(float f) : x(emu::bits<uint16_t>(_Float16(f))) {}
};
struct __nv_bfloat16 {
  uint16_t x = 0;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float f) {
    const uint32_t b = emu::bits<uint32_t>(f);
    x = f != f ? 0x7fff : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
};
struct alignas(4) __half2 { __half x, y; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __half2float(__half h) { return float(emu::bits<_Float16>(h.x)); }
inline float __bfloat162float(__nv_bfloat16 h) { return emu::bits<float>(uint32_t(h.x) << 16); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }

// ------------------------------------------------------------------------------------------------ the runtime
namespace emu {
struct Ids {
  dim3 thread, block, block_dim, grid_dim;
};
extern Ids ids;  // of the thread that runs; a fiber's own before and after every switch
void sync_threads();
void sync_warp(unsigned mask);
void exchange(unsigned mask, uint64_t mine, int source_lane, int detail, uint64_t& theirs);
void touch(const void* at);  // of a prefetch: may be read
void* shared(int which, size_t bytes, size_t alignment);  // the block's; -1: the dynamic part
[[noreturn]] void trap();
[[noreturn]] void fail(const char* what);
bool run(dim3 grid, dim3 block, size_t dynamic, void (*body)(void*), void* argument);  // false: a thread trapped
void count_reduction();
extern uint64_t seed;
extern int fault;            // which of the planted faults is on; 0: none
extern int64_t most_blocks;  // along the grid's y
extern size_t dynamic_allowed;  // shared memory that the next launch has been allowed beyond 48 KiB
constexpr size_t kStaticShared = 47 << 10;  // what cudaFuncGetAttributes says of every kernel; no kernel may have more
constexpr size_t kShared = 227 << 10;       // of an H100's block

template <typename Kernel, typename... Arguments>
bool launch(Kernel kernel, dim3 grid, dim3 block, size_t dynamic, Arguments... arguments) {
  auto call = [&] { kernel(arguments...); };
  return run(grid, block, dynamic, [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
}

template <typename T>
T shuffle(unsigned mask, T x, int source, int detail) {
  static_assert(sizeof(T) <= 8);
  uint64_t mine = 0, theirs;
  std::memcpy(&mine, &x, sizeof x);
  exchange(mask, mine, source, detail, theirs);
  std::memcpy(&x, &theirs, sizeof x);
  return x;
}
template <typename T>
T shuffle_xor(unsigned mask, T x, int lanes, int width) {
  const int lane = ids.thread.x % 32, source = lane ^ lanes;
  // sources in a later segment of `width` lanes give the lane's own value
  return shuffle(mask, x, source / width <= lane / width ? source : lane, lanes * 64 + width);
}

template <typename T, typename Bits, typename F>
T atomically(T* to, F change) {
  Bits old = __atomic_load_n(reinterpret_cast<Bits*>(to), __ATOMIC_RELAXED), next;
  do next = bits<Bits>(change(bits<T>(old)));
  while (!__atomic_compare_exchange_n(reinterpret_cast<Bits*>(to), &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return bits<T>(old);
}
}  // namespace emu

#define threadIdx (emu::ids.thread)
#define blockIdx (emu::ids.block)
#define blockDim (emu::ids.block_dim)
#define gridDim (emu::ids.grid_dim)

inline void __syncthreads() { emu::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_warp(mask); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32) {
  return emu::shuffle_xor(mask, x, lanes, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int lanes) {
  const int lane = emu::ids.thread.x % 32;
  return emu::shuffle(mask, x, lane >= lanes ? lane - lanes : lane, 1 << 20 | lanes);
}
template <typename T>
T __shfl_sync(unsigned mask, T x, int source) {
  return emu::shuffle(mask, x, source % 32, 1 << 21);  // the source may be another one for each lane
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline float atomicAdd(float* to, float by) {
  return emu::atomically<float, uint32_t>(to, [&](float x) { return x + by; });
}
inline double atomicAdd(double* to, double by) {
  return emu::atomically<double, uint64_t>(to, [&](double x) { return x + by; });
}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long by) {
  return __atomic_fetch_add(to, by, __ATOMIC_RELAXED);
}
inline int atomicAdd(int* to, int by) { return __atomic_fetch_add(to, by, __ATOMIC_RELAXED); }
inline int atomicCAS(int* to, int expected, int by) {  // what was there
  __atomic_compare_exchange_n(to, &expected, by, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
inline void prefetch_l1(const void* at) { emu::touch(at); }  // prefetch.global.L1
inline unsigned atomicMax(unsigned* to, unsigned by) {
  return emu::atomically<unsigned, uint32_t>(to, [&](unsigned x) { return x > by ? x : by; });
}
inline void red_add_v4(float* to, float a, float b, float c, float d) {  // red.global.add.v4.f32
  if (reinterpret_cast<uintptr_t>(to) % 16) emu::fail("red.global.add.v4.f32: address not a multiple of 16");
  emu::count_reduction();
  atomicAdd(to, a), atomicAdd(to + 1, b), atomicAdd(to + 2, c), atomicAdd(to + 3, d);
}
inline float __expf(float x) { return expf(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return emu::bits<double>(x); }
inline long long __double2ll_rn(double x) {
  return !(x > -9.3e18 && x < 9.2e18) ? INT64_MIN : llrint(x);  // what does not fit: some number
}
[[noreturn]] inline void __trap() { emu::trap(); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------ the host's side
#define CUDART_VERSION 13000
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure, cudaErrorInvalidDevice };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
namespace emu {
extern cudaError_t error;
extern int driver;
}  // namespace emu
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emu::error;
  emu::error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "a thread of an emulated kernel trapped";
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t) {
  std::memset(to, byte, count);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = emu::driver, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = int(emu::kShared), cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return attributes->sharedSizeBytes = emu::kStaticShared, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return emu::dynamic_allowed = size_t(bytes), cudaSuccess;
}
namespace emu {
template <typename F, typename... X>
void launch_as(F f, dim3 grid, dim3 block, size_t shared, X... x) {  // what <<<...>>> becomes
  error = launch(f, grid, block, shared, x...) ? cudaSuccess : cudaErrorLaunchFailure;
}
}  // namespace emu
