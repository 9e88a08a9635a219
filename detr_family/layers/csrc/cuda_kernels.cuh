// The CUDA kernels.
//
// A query's head is the work of `group` neighbouring lanes, each with 16 bytes of the D channels: 8 lanes for 32 floats,
// 4 for 32 halves. A block takes one head of 256 / group queries; where the queries are the tokens themselves (the
// encoder), these are an 8x8 tile of neighbouring pixels, or half of one, so that what one query reads serves the next.
// Each lane works out a few points, and passes them to its group through shared memory: 24 bytes per point that two
// loads fetch for the whole group, where shuffles would take six. The backward's four dot products per point
// are summed over the group by halving (lane j ends up with point j's), so that each lane finishes the points it began.
//
// Two variants wait for a GPU to decide about them (detr_family_cuda_variants): a backward that sums within the block
// what goes to one token before it leaves the block, and a forward whose block takes its queries through several heads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#define DETR_INLINE __host__ __device__ __forceinline__
#include "cuda_params.h"

namespace detr_family {
#include "point.inl"

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffffu;

// ------------------------------------------------------------------------------------------- loads and stores
template <typename V, int width>
struct Lane {  // one number: the kernel for any D
  static __device__ __forceinline__ float to(float x) { return x; }
  static __device__ __forceinline__ double to(double x) { return x; }
  static __device__ __forceinline__ float to(__half x) { return __half2float(x); }
  static __device__ __forceinline__ float to(__nv_bfloat16 x) { return __bfloat162float(x); }
  template <typename T>
  static __device__ __forceinline__ void load(const V* from, bool inside, T (&to_)[1]) {
    to_[0] = inside ? T(to(*from)) : T(0);
  }
  template <typename T>
  static __device__ __forceinline__ void store(V* target, const T (&from)[1]) {
    *target = V(from[0]);
  }
};

template <>
struct Lane<float, 4> {
  using Packed = float4;
  static __device__ __forceinline__ void unpack(const float4& x, float (&to)[4]) {
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  }
  static __device__ __forceinline__ void load(const float* from, bool inside, float (&to)[4]) {
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (inside) x = __ldg(reinterpret_cast<const float4*>(from));
    unpack(x, to);
  }
  static __device__ __forceinline__ void store(float* to, const float (&from)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  }
};

template <>
struct Lane<__nv_bfloat16, 8> {
  using Packed = uint4;
  static __device__ __forceinline__ void unpack(const uint4& x, float (&to)[8]) {
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a bfloat16 is the upper half of a float
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ void load(const __nv_bfloat16* from, bool inside, float (&to)[8]) {
    uint4 x = make_uint4(0, 0, 0, 0);
    if (inside) x = __ldg(reinterpret_cast<const uint4*>(from));
    unpack(x, to);
  }
  static __device__ __forceinline__ void store(__nv_bfloat16* to, const float (&from)[8]) {
    alignas(16) __nv_bfloat162 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pairs);
  }
};

template <>
struct Lane<__half, 8> {
  using Packed = uint4;
  static __device__ __forceinline__ void unpack(const uint4& x, float (&to)[8]) {
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ void load(const __half* from, bool inside, float (&to)[8]) {
    uint4 x = make_uint4(0, 0, 0, 0);
    if (inside) x = __ldg(reinterpret_cast<const uint4*>(from));
    unpack(x, to);
  }
  static __device__ __forceinline__ void store(__half* to, const float (&from)[8]) {
    alignas(16) __half2 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pairs);
  }
};

template <typename N>
__device__ __forceinline__ auto number(N x) {
  return Lane<N, 1>::to(x);
}

// ---------------------------------------------------------------------------------------- sums of grad_value
template <typename T, int width>
__device__ __forceinline__ void add(T* to, const T (&by)[width]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 4 && width % 4 == 0) {
#pragma unroll
    for (int i = 0; i < width; i += 4) {
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + i), "f"(by[i]), "f"(by[i + 1]),
                   "f"(by[i + 2]), "f"(by[i + 3])
                   : "memory");
    }
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < width; ++i) atomicAdd(to + i, by[i]);
}

// The deterministic variant: integers add up the same in any order. What is not finite is added to the numbers
// themselves: it makes infinity or NaN of those that it reaches, in any order, and of no other.
struct FixedPoint {
  double unit;  // units per 1, a power of two
  double most;  // units of one contribution: rounding may bring it a little above the product of the limits
};

// As many units per 1 as keep the sum of all that can meet in one number below 2^63.
// limits: the bits of the largest finite |grad_output| and |weight|, as floats rounded up.
__device__ __forceinline__ FixedPoint fixed_point(const unsigned* limits, int64_t contributions) {
  const double one = double(__uint_as_float(limits[0])) * double(__uint_as_float(limits[1]));
  const double all = one * double(contributions);
  const double unit = all > 0 ? scalbn(1.0, 61 - ilogb(all)) : 1.0;
  return {unit, 1.5 * one * unit};
}

template <typename T, int width>
__device__ __forceinline__ void add_fixed(int64_t* sums, T* numbers, const T (&by)[width], const FixedPoint& fixed) {
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const double units = double(by[i]) * fixed.unit;
    if (fabs(units) <= fixed.most) {
      atomicAdd(reinterpret_cast<unsigned long long*>(sums + i), static_cast<unsigned long long>(__double2ll_rn(units)));
    } else {
      atomicAdd(numbers + i, by[i]);
    }
  }
}

template <typename V>
__global__ void largest_kernel(const V* from, int64_t count, unsigned* to) {
  unsigned largest = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const auto x = number(from[i]);
    float y = fabsf(float(x));
    if (double(y) < fabs(double(x))) y = __uint_as_float(__float_as_uint(y) + 1);  // a double rounded down
    const unsigned bits = __float_as_uint(y);  // of what is not negative, in its order; infinity and NaN last
    if (bits < 0x7f800000u) largest = max(largest, bits);
  }
  for (int step = 16; step; step /= 2) largest = max(largest, __shfl_xor_sync(kWarp, largest, step));
  if (threadIdx.x % 32 == 0) atomicMax(to, largest);
}

template <typename T>
__global__ void from_fixed_kernel(const int64_t* from, T* to, int64_t count, const unsigned* limits,
                                  int64_t contributions) {
  const double unit = fixed_point(limits, contributions).unit;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    to[i] += T(double(from[i]) / unit);  // was zero, infinity or NaN
}

// ----------------------------------------------------------------------------------------------------- points
struct Level {
  int32_t width, height, start, index;
};

// What a group needs of a point: the corners' weights, and (token of corner 0) * 16 + which corners lie inside.
template <typename T>
struct alignas(4 * sizeof(T)) Weights {
  T corner[4];
};
struct Place {
  int32_t token_and_mask, width;
};

// The i-th query in the order of 8x8 tiles: in each level bands of 8 rows, in those tiles of 8 columns, row by row. What
// is left of a level at its edges makes narrower tiles, so that this is a reordering of the queries, no more.
__device__ inline int64_t in_tiles(int64_t i, const Params& params) {
  int64_t end = 0;
  for (int l = 0; l < params.levels; ++l) {
    const int32_t height = int32_t(params.shapes[2 * l]), width = int32_t(params.shapes[2 * l + 1]);
    const int64_t begin = end;
    end += int64_t(height) * width;
    if (i >= end) continue;
    const int32_t j = int32_t(i - begin);
    const int32_t band = j / (8 * width), in_band = j - band * 8 * width;
    const int32_t rows = min(8, height - 8 * band);
    const int32_t tile = in_band / (8 * rows), in_tile = in_band - tile * 8 * rows;
    const int32_t columns = min(8, width - 8 * tile);
    const int32_t row = in_tile / columns;
    return begin + int64_t(band * 8 + row) * width + tile * 8 + in_tile - row * columns;
  }
  return i;
}

// What a block sets up: its points' levels, and its queries.
template <int queries>
__device__ __forceinline__ void set_up(const Params& params, Level* level_of_point, int64_t (&query)[queries]) {
  const int count = params.levels * params.points;
  for (int k = threadIdx.x; k < count; k += kThreads) {
    const int l = k / params.points;
    const int64_t height = params.shapes[2 * l], width = params.shapes[2 * l + 1], start = params.starts[l];
    int64_t before = 0;
#pragma unroll 1
    for (int i = 0; i < l; ++i) before += params.shapes[2 * i] * params.shapes[2 * i + 1];
    const int64_t end = before + height * width;
    if (height < 1 || width < 1 || height > params.tokens || width > params.tokens || start != before ||
        end > params.tokens || (l == params.levels - 1 && end != params.tokens)) {
      printf("ms_deform_attn: level %d of spatial_shapes, %lld x %lld from token %lld, is not what follows %lld tokens, "
             "or all are not the %lld of value\n",
             l, (long long)height, (long long)width, (long long)start, (long long)before, (long long)params.tokens);
      __trap();
    }
    level_of_point[k] = {int32_t(width), int32_t(height), int32_t(start), l};
  }
  for (int k = threadIdx.x; k < queries; k += kThreads) {
    const int64_t i = int64_t(blockIdx.x) * queries + k;
    query[k] = i >= params.queries ? -1 : params.tiled ? in_tiles(i, params) : i;
  }
  __syncthreads();
}

template <int group, typename T>
__device__ __forceinline__ T sum_over_group(T x) {
#pragma unroll
  for (int step = group / 2; step; step /= 2) x += __shfl_xor_sync(kWarp, x, step, group);
  return x;
}

template <int group, typename T>
__device__ __forceinline__ T largest_of_group(T x) {
#pragma unroll
  for (int step = group / 2; step; step /= 2) {
    const T other = __shfl_xor_sync(kWarp, x, step, group);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// v[j] of each lane's `group` numbers is summed over the group; lane j gets sum j.
template <int group, typename T>
__device__ __forceinline__ T share_out(T (&v)[group], int lane) {
#pragma unroll
  for (int half = group / 2; half; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T away = upper ? v[i] : v[i + half];
      const T kept = upper ? v[i + half] : v[i];
      v[i] = kept + __shfl_xor_sync(kWarp, away, half, group);
    }
  }
  return v[0];
}

// V: type of the value; T: of sums and coordinates; N: of offsets and logits (or locations and weights); width: numbers
// per lane; group: lanes per query, of which width * group are D, or (exact false) D is whatever it is.
template <typename V_, typename T_, typename N_, int width_, int group_, bool exact_, bool fused_>
struct Config {
  using V = V_;
  using T = T_;
  using N = N_;
  static constexpr int width = width_, group = group_;
  static constexpr bool exact = exact_, fused = fused_;
  static constexpr int queries = kThreads / group;            // of a block
  static constexpr int chunk = group > 16 ? group : 16;       // points at a time
  static constexpr int own = chunk / group;                   // of which one lane works out so many
  static constexpr int stride = chunk + 1;                    // of the exchange: keeps groups off one another's banks
};

// The points that a lane works out, kept for the backward.
template <typename T, int own>
struct OwnPoints {
  T lx[own], ly[own], attention[own], scale_x[own], scale_y[own];
};

template <typename C>
struct Exchange {
  Weights<typename C::T> weights[C::queries * C::stride];
  Place places[C::queries * C::stride];
};

// Works out the points [first, first + chunk) of a query and puts them into the exchange.
template <typename C>
__device__ __forceinline__ void work_out(const Params& params, const Level* level_of_point, Exchange<C>& exchange, int slot,
                                         int lane, int first, int64_t row, int64_t batch_query, typename C::T largest,
                                         typename C::T factor, OwnPoints<typename C::T, C::own>& points) {
  using T = typename C::T;
  using N = typename C::N;
  const int count = params.levels * params.points;
  const N* numbers = static_cast<const N*>(params.numbers) + row * count * 2;
  const N* weights = static_cast<const N*>(params.weights) + row * count;
#pragma unroll
  for (int i = 0; i < C::own; ++i) {
    if (i > 0 && first + i * C::group >= count) break;  // nobody asks for these
    const int k = first + i * C::group + lane;
    const bool there = k < count;
    const int j = there ? k : 0;
    const Level level = level_of_point[j];
    const T size_x = T(level.width), size_y = T(level.height);
    const T x = T(number(numbers[2 * j])), y = T(number(numbers[2 * j + 1]));
    T attention = there ? T(number(weights[j])) : T(0);
    T scale_x = size_x, scale_y = size_y, base_x = T(-0.5), base_y = T(-0.5);
    if constexpr (C::fused) {
      attention = there ? exponential(attention - largest) * factor : T(0);
      const T* reference = static_cast<const T*>(params.reference) +
                           (batch_query * params.levels + level.index) * params.reference_dims;
      base_x += reference[0] * size_x;
      base_y += reference[1] * size_y;
      const T part = T(0.5) / T(params.points);
      scale_x = params.reference_dims == 2 ? T(1) : reference[2] * size_x * part;
      scale_y = params.reference_dims == 2 ? T(1) : reference[3] * size_y * part;
    }
    Axis<T, int32_t> along_x, along_y;
    locate(x, scale_x, base_x, level.width, along_x);
    locate(y, scale_y, base_y, level.height, along_y);
    const int32_t outer[4] = {along_x.first | along_y.first, along_x.second | along_y.first,
                              along_x.first | along_y.second, along_x.second | along_y.second};
    Weights<T> corners;
    corner_weights(along_x.fraction, along_y.fraction, attention, corners.corner);
    int32_t mask = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) mask |= (outer[c] >= 0 && there) ? 1 << c : 0;
    const int32_t token = level.start + along_y.pixel * level.width + along_x.pixel;
    exchange.weights[slot * C::stride + i * C::group + lane] = corners;
    exchange.places[slot * C::stride + i * C::group + lane] = {token * 16 + mask, level.width};
    points.lx[i] = along_x.fraction;
    points.ly[i] = along_y.fraction;
    points.attention[i] = attention;
    points.scale_x[i] = scale_x;
    points.scale_y[i] = scale_y;
  }
}

// The largest of a query's logits, and one over the sum of the others' exponentials beside it.
template <typename C>
__device__ __forceinline__ void normalise(const Params& params, int lane, int64_t row, typename C::T& largest,
                                          typename C::T& factor) {
  using T = typename C::T;
  const int count = params.levels * params.points;
  const typename C::N* logits = static_cast<const typename C::N*>(params.weights) + row * count;
  largest = T(number(logits[0]));
  for (int k = lane; k < count; k += C::group) {
    const T x = T(number(logits[k]));
    largest = x > largest ? x : largest;
  }
  largest = largest_of_group<C::group>(largest);
  T sum = T(0);
  for (int k = lane; k < count; k += C::group) sum += exponential(T(number(logits[k])) - largest);
  factor = T(1) / sum_over_group<C::group>(sum);
}

// a * b + c in one instruction, which nvcc makes five of once b is the same for all threads.
__device__ __forceinline__ uint64_t multiply_add_wide(int32_t a, int32_t b, uint64_t c) {
  uint64_t result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(a), "r"(b), "l"(c));
  return result;
}

// The four corners of point j of the chunk.
struct Corners {
  int32_t upper, lower;  // the tokens of corners 0 and 2
  bool inside[4];

  __device__ __forceinline__ Corners(const Place& place, bool there) {
    upper = place.token_and_mask >> 4;
    lower = upper + place.width;
#pragma unroll
    for (int c = 0; c < 4; ++c) inside[c] = (place.token_and_mask >> c & 1) && there;
  }

  __device__ __forceinline__ int32_t token(int c) const { return (c < 2 ? upper : lower) + c % 2; }

  template <typename X>
  __device__ __forceinline__ X* at(X* first, int c, int32_t row_bytes) const {
    const int32_t token = c < 2 ? upper : lower;
    const uint64_t address = multiply_add_wide(token, row_bytes, reinterpret_cast<uint64_t>(first));
    return reinterpret_cast<X*>(address + c % 2 * row_bytes);
  }

  // Values; zero outside.
  template <typename V, typename T, int width>
  __device__ __forceinline__ void load(const V* first, int32_t row_bytes, T (&value)[4][width]) const {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      Lane<V, width>::load(at(first, c, row_bytes), inside[c], value[c]);
  }
};

// ------------------------------------------------------------------- sums of a block before they leave it
// What a block's queries add to grad_value goes to few tokens: in the encoder, 5.6 (float32) or 7.5 (16 bits)
// contributions to each. The combining backward sorts a chunk's contributions by token and sums each token's before one
// reduction takes it away. Sorting is counting: a table gives each token a slot (integer atomics on shared memory are the
// hardware's own, those of floats are loops), each contribution learns its rank in its slot, a sum over the slots'
// counts says where each begins. Then every group takes an equal share of the sorted contributions.
constexpr int kSlots = 1024;  // of the table, a power of two
constexpr int kProbes = 8;    // slots that a token tries; what finds none is reduced by itself
constexpr uint32_t kNowhere = 0xffffffffu;
constexpr unsigned kBeginsRun = 0x8000u;

template <typename C>
struct Rows {
  int32_t token[kSlots];      // -1: free
  int32_t count[kSlots + 1];  // of a slot's contributions, then where they begin; last, those that found no slot
  int32_t total;
  uint16_t order[C::queries * C::chunk * 4];  // where the exchange has their weights, sorted; kBeginsRun: another token
  typename Lane<typename C::V, C::width>::Packed grad[C::queries * C::group];  // grad_output of the block's queries
};

template <typename C>
__device__ __forceinline__ void clear(Rows<C>& rows) {
#pragma unroll
  for (int n = 0; n < kSlots / kThreads; ++n) {
    rows.token[n * kThreads + threadIdx.x] = -1;
    rows.count[n * kThreads + threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) rows.count[kSlots] = 0;
}

__device__ __forceinline__ int slot_of(int32_t (&table)[kSlots], int32_t token) {
  unsigned at = unsigned(token) * 2654435769u >> 22;  // neighbours come to lie far apart
#pragma unroll 1
  for (int probe = 0; probe < kProbes; ++probe) {
    const int32_t found = atomicCAS(&table[at], -1, token);
    if (found == -1 || found == token) return int(at);
    at = (at + 1) % kSlots;
  }
  return kSlots;
}

// Enters the contributions of the points that this lane worked out: the slot of each, and its rank there * 65536.
template <typename C>
__device__ __forceinline__ void enter(Rows<C>& rows, const Exchange<C>& exchange, int slot, int lane, int points,
                                      uint32_t (&entered)[C::own][4]) {
#pragma unroll
  for (int i = 0; i < C::own; ++i) {
    const int j = i * C::group + lane;
    const Corners corners(exchange.places[slot * C::stride + j], j < points);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      entered[i][c] = kNowhere;
      if (!corners.inside[c]) continue;
      const int at = slot_of(rows.token, corners.token(c));
      entered[i][c] = unsigned(at) | unsigned(atomicAdd(&rows.count[at], 1)) << 16;
    }
  }
}

// Makes of each slot's count where its contributions begin; in which order the slots follow is open.
template <typename C>
__device__ __forceinline__ void place_slots(Rows<C>& rows) {
  int32_t counts[kSlots / kThreads], sum = threadIdx.x == 0 ? rows.count[kSlots] : 0;
#pragma unroll
  for (int n = 0; n < kSlots / kThreads; ++n) sum += counts[n] = rows.count[n * kThreads + threadIdx.x];
  const int lane = int(threadIdx.x % 32);
  int32_t up_to = sum;  // with the warp's threads before
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kWarp, up_to, step);
    if (lane >= step) up_to += other;
  }
  int32_t begin = 0;
  if (lane == 31) begin = atomicAdd(&rows.total, up_to);
  begin = __shfl_sync(kWarp, begin, 31) + up_to - sum;
#pragma unroll
  for (int n = 0; n < kSlots / kThreads; ++n) {
    rows.count[n * kThreads + threadIdx.x] = begin;
    begin += counts[n];
  }
  if (threadIdx.x == 0) rows.count[kSlots] = begin;
}

// Puts the contributions where they belong.
template <typename C>
__device__ __forceinline__ void sort(Rows<C>& rows, int slot, int lane, const uint32_t (&entered)[C::own][4]) {
#pragma unroll
  for (int i = 0; i < C::own; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (entered[i][c] == kNowhere) continue;
      const unsigned at = entered[i][c] & 0xffffu, rank = entered[i][c] >> 16;
      const unsigned id = unsigned((slot * C::stride + i * C::group + lane) * 4 + c);
      rows.order[rows.count[at] + rank] = uint16_t(rank == 0 || at == kSlots ? id | kBeginsRun : id);
    }
  }
}

// One group's share of the sorted contributions: sums them token by token. `grad_base` is the lane's first channel.
template <typename C>
__device__ __forceinline__ void reduce_rows(const Rows<C>& rows, const Exchange<C>& exchange, int slot, int lane,
                                            typename C::T* grad_base, int32_t row_bytes) {
  using T = typename C::T;
  using Packed = typename Lane<typename C::V, C::width>::Packed;
  static_assert(C::queries * C::stride * 4 <= int(kBeginsRun));
  const T* weights = exchange.weights[0].corner;
  const Packed* grads = rows.grad + lane;
  const int share = (rows.total + C::queries - 1) / C::queries;  // there are as many groups as queries
  const int end = min(slot * share + share, rows.total);
  T sum[C::width] = {};
  unsigned id = kNowhere;
  const auto leave = [&] {
    const Corners corners(exchange.places[id / 4], true);
    const int32_t token = (id & 2 ? corners.lower : corners.upper) + int32_t(id & 1);
    const uint64_t address = multiply_add_wide(token, row_bytes, reinterpret_cast<uint64_t>(grad_base));
    add(reinterpret_cast<T*>(address), sum);
  };
  const auto fetch = [&](unsigned entry, T& weight, Packed& grad) {
    weight = weights[entry & (kBeginsRun - 1)];
    grad = grads[(entry & (kBeginsRun - 1)) / unsigned(C::stride * 4) * C::group];
  };
  const auto take = [&](unsigned entry, T weight, const Packed& packed) {
    if ((entry & kBeginsRun) && id != kNowhere) {
      leave();
#pragma unroll
      for (int i = 0; i < C::width; ++i) sum[i] = T(0);
    }
    id = entry & (kBeginsRun - 1);
    T grad[C::width];
    Lane<typename C::V, C::width>::unpack(packed, grad);
#pragma unroll
    for (int i = 0; i < C::width; ++i) sum[i] += weight * grad[i];
  };
  int r = slot * share;
#pragma unroll 1
  for (; r + 4 <= end; r += 4) {  // fours: their loads go out together
    unsigned entries[4];
    T four[4];
    Packed packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) entries[i] = rows.order[r + i];
#pragma unroll
    for (int i = 0; i < 4; ++i) fetch(entries[i], four[i], packed[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) take(entries[i], four[i], packed[i]);
  }
#pragma unroll 1
  for (; r < end; ++r) {
    T weight;
    Packed packed;
    fetch(rows.order[r], weight, packed);
    take(rows.order[r], weight, packed);
  }
  if (id != kNowhere) leave();
}

// ------------------------------------------------------------------------------------------- through the heads
// A block takes one head of its queries after the other that the grid's height leaves it, mostly one, or, `through`,
// kHeads neighbours at least: the set-up is done once, and the next head's numbers come while this one's values do.
constexpr int kHeads = 4;

template <bool through>
__device__ __forceinline__ int64_t first_head() {
  return int64_t(blockIdx.y) * (through ? kHeads : 1);
}

template <bool through>
__device__ __forceinline__ int64_t next_head(int64_t head) {
  if (through && (head + 1) % kHeads) return head + 1;
  return head + 1 + int64_t(gridDim.y - 1) * (through ? kHeads : 1);
}

// Asks for the numbers and weights of the next row, which the next head will work out.
template <typename C>
__device__ __forceinline__ void prefetch_row(const Params& params, int lane, int64_t row) {
  const int count = params.levels * params.points;
  const typename C::N* numbers = static_cast<const typename C::N*>(params.numbers) + row * count * 2;
  const typename C::N* weights = static_cast<const typename C::N*>(params.weights) + row * count;
  for (int k = lane; k < count; k += C::group) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(numbers + 2 * k));
    asm volatile("prefetch.global.L1 [%0];" ::"l"(weights + k));
  }
}

// ---------------------------------------------------------------------------------------------------- kernels
template <typename C, bool through>
__global__ void __launch_bounds__(kThreads, sizeof(typename C::T) == 4 ? 4 : 2)
    forward_kernel(const __grid_constant__ Params params) {
  using T = typename C::T;
  using V = typename C::V;
  extern __shared__ Level level_of_point[];
  __shared__ Exchange<C> exchange;
  __shared__ int64_t query[C::queries];
  set_up(params, level_of_point, query);
  const int slot = threadIdx.x / C::group, lane = threadIdx.x % C::group;
  const int64_t q = query[slot] < 0 ? 0 : query[slot];  // beyond the last query: works along, stores nothing
  const int count = params.levels * params.points;
  const int32_t row_stride = params.heads * params.channels, row_bytes = row_stride * int32_t(sizeof(V));
  const int64_t heads = int64_t(params.batch) * params.heads;
  for (int64_t head = first_head<through>(); head < heads; head = next_head<through>(head)) {
    const int64_t b = head / params.heads, m = head % params.heads;
    const int64_t row = (b * params.queries + q) * params.heads + m;
    T largest = T(0), factor = T(1);
    if constexpr (C::fused) normalise<C>(params, lane, row, largest, factor);
    for (int first_channel = 0; first_channel < params.channels; first_channel += C::width * C::group) {
      const int channel = first_channel + lane * C::width;
      const bool there = C::exact || channel < params.channels;
      const V* base = static_cast<const V*>(params.value) + b * params.tokens * row_stride + m * params.channels + channel;
      T sum[C::width] = {};
      for (int first = 0; first < count; first += C::chunk) {
        OwnPoints<T, C::own> points;
        __syncwarp();
        work_out<C>(params, level_of_point, exchange, slot, lane, first, row, b * params.queries + q, largest, factor,
                    points);
        __syncwarp();
        if constexpr (through) {
          if (first == 0 && (head + 1) % kHeads && m + 1 < params.heads) prefetch_row<C>(params, lane, row + 1);
        }
        const int end = min(C::chunk, count - first);
#pragma unroll 4
        for (int j = 0; j < end; ++j) {
          const Weights<T> weights = exchange.weights[slot * C::stride + j];
          const Corners corners(exchange.places[slot * C::stride + j], there);
          T value[4][C::width];
          corners.load(base, row_bytes, value);
#pragma unroll
          for (int c = 0; c < 4; ++c)
#pragma unroll
            for (int i = 0; i < C::width; ++i) sum[i] += weights.corner[c] * value[c][i];
        }
      }
      if (query[slot] >= 0 && there)
        Lane<V, C::width>::store(static_cast<V*>(params.output) + row * params.channels + channel, sum);
    }
  }
}

enum class Sums { each, fixed, combined };  // of grad_value: a reduction per contribution, the same in fixed point, per token

template <typename C, Sums sums>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const __grid_constant__ Params params) {
  using T = typename C::T;
  using V = typename C::V;
  using N = typename C::N;
  constexpr bool deterministic = sums == Sums::fixed;
  extern __shared__ Level level_of_point[];
  __shared__ Exchange<C> exchange;
  __shared__ int64_t query[C::queries];
  set_up(params, level_of_point, query);
  const int slot = threadIdx.x / C::group, lane = threadIdx.x % C::group;
  const bool real = query[slot] >= 0;
  const int64_t q = real ? query[slot] : 0;
  const int count = params.levels * params.points;
  const int32_t row_stride = params.heads * params.channels, row_bytes = row_stride * int32_t(sizeof(V));
  FixedPoint fixed{};
  if constexpr (deterministic) fixed = fixed_point(params.limits, params.queries * count);
  for (int64_t head = blockIdx.y; head < int64_t(params.batch) * params.heads; head += gridDim.y) {
    const int64_t b = head / params.heads, m = head % params.heads;
    const int64_t row = (b * params.queries + q) * params.heads + m;
    const int64_t head_begin = b * params.tokens * row_stride + m * params.channels;
    N* grad_numbers = static_cast<N*>(params.grad_numbers) + row * count * 2;
    N* grad_weights = static_cast<N*>(params.grad_weights) + row * count;
    T largest = T(0), factor = T(1), total = T(0);  // total: of attention * its gradient, for the softmax
    if constexpr (C::fused) normalise<C>(params, lane, row, largest, factor);
    for (int first = 0; first < count; first += C::chunk) {
      OwnPoints<T, C::own> points;
      T grad_attention[C::own];
      if constexpr (sums == Sums::combined) {
        __shared__ Rows<C> rows;
        using Packed = typename Lane<V, C::width>::Packed;
        uint32_t entered[C::own][4];
        if (head == blockIdx.y && first == 0) clear(rows);
        __syncthreads();  // nobody reads the round before, and the table is clear
        if (threadIdx.x == 0) rows.total = 0;
        work_out<C>(params, level_of_point, exchange, slot, lane, first, row, b * params.queries + q, largest, factor,
                    points);
        if (first == 0) {
          const V* from = static_cast<const V*>(params.grad_output) + row * params.channels + lane * C::width;
          rows.grad[slot * C::group + lane] = __ldg(reinterpret_cast<const Packed*>(from));
        }
        enter(rows, exchange, slot, lane, real ? count - first : 0, entered);
        __syncthreads();  // counts are whole
        place_slots(rows);
        __syncthreads();  // slots have their places
        sort(rows, slot, lane, entered);
        __syncthreads();  // contributions are sorted
        clear(rows);
        T* grad_base = static_cast<T*>(params.grad_value) + head_begin + lane * C::width;
        reduce_rows(rows, exchange, slot, lane, grad_base, row_stride * int32_t(sizeof(T)));
      } else {
        __syncwarp();
        work_out<C>(params, level_of_point, exchange, slot, lane, first, row, b * params.queries + q, largest, factor,
                    points);
        __syncwarp();
      }
#pragma unroll
      for (int part = 0; part < C::own; ++part) {
        T own_dots[4] = {};
        const int begin = part * C::group, end = min(C::group, count - first - begin);
        if (end <= 0) break;
        for (int first_channel = 0; first_channel < params.channels; first_channel += C::width * C::group) {
          const int channel = first_channel + lane * C::width;
          const bool there = C::exact || channel < params.channels;
          const V* base = static_cast<const V*>(params.value) + head_begin + channel;
          T* grad_base = static_cast<T*>(params.grad_value) + head_begin + channel;
          [[maybe_unused]] int64_t* sums_base = nullptr;
          if constexpr (deterministic) sums_base = params.sums + head_begin + channel;
          T grad[C::width];
          Lane<V, C::width>::load(static_cast<const V*>(params.grad_output) + row * params.channels + channel,
                                  there && real, grad);
          T dots[4][C::exact ? C::group : 1] = {};
#pragma unroll
          for (int j = 0; j < C::group; ++j) {
            if (C::exact ? j % 4 == 0 && j >= end : j >= end) break;  // fours: their loads go out together
            const Weights<T> weights = exchange.weights[slot * C::stride + begin + j];
            // what lies beyond `count` is outside, work_out says
            const Corners corners(exchange.places[slot * C::stride + begin + j], there);
            T value[4][C::width];
            corners.load(base, row_bytes, value);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              T dot = T(0);
#pragma unroll
              for (int i = 0; i < C::width; ++i) dot += grad[i] * value[c][i];
              if constexpr (sums != Sums::combined) {
                T by[C::width];
#pragma unroll
                for (int i = 0; i < C::width; ++i) by[i] = grad[i] * weights.corner[c];
                if (corners.inside[c] && real) {
                  T* numbers = corners.at(grad_base, c, row_stride * int32_t(sizeof(T)));
                  if constexpr (deterministic) {
                    add_fixed(corners.at(sums_base, c, row_stride * 8), numbers, by, fixed);
                  } else {
                    add(numbers, by);
                  }
                }
              }
              if constexpr (C::exact) {
                dots[c][j] = dot;
              } else {
                dot = sum_over_group<C::group>(dot);
                if (lane == j) own_dots[c] += dot;
              }
            }
          }
          if constexpr (C::exact) {
#pragma unroll
            for (int c = 0; c < 4; ++c) own_dots[c] = share_out<C::group>(dots[c], lane);
          }
        }
        PointGradient<T> gradient;
        point_gradient(points.lx[part], points.ly[part], points.attention[part], points.scale_x[part],
                       points.scale_y[part], own_dots, gradient);
        grad_attention[part] = gradient.attention;
        const int k = first + begin + lane;
        if (k < count && real) {
          grad_numbers[2 * k] = N(gradient.x);
          grad_numbers[2 * k + 1] = N(gradient.y);
          if (!C::fused || count > C::chunk) grad_weights[k] = N(gradient.attention);
        }
        if constexpr (C::fused) total += k < count ? points.attention[part] * gradient.attention : T(0);
      }
      if constexpr (C::fused) {
        if (count <= C::chunk) {  // all points are still at hand
          const T all = sum_over_group<C::group>(total);
#pragma unroll
          for (int part = 0; part < C::own; ++part) {
            const int k = part * C::group + lane;
            if (k < count && real)
              grad_weights[k] = N(softmax_gradient(points.attention[part], grad_attention[part], all));
          }
        }
      }
    }
    if constexpr (C::fused) {
      if (count > C::chunk) {  // each lane reads back what it has written
        const T all = sum_over_group<C::group>(total);
        const N* logits = static_cast<const N*>(params.weights) + row * count;
        for (int k = lane; k < count; k += C::group) {
          const T attention = exponential(T(number(logits[k])) - largest) * factor;
          if (real) grad_weights[k] = N(softmax_gradient(attention, T(number(grad_weights[k])), all));
        }
      }
    }
  }
}

}  // namespace detr_family
