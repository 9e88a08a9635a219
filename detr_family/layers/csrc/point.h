// The arithmetic of one sampling point, for the CPU and the CUDA kernels alike (arXiv 2010.04159, equation 3).
//
// A coordinate in pixels is  x = number * scale + base:
//   sampling locations in [0, 1]:  number = location, scale = width,           base = -0.5
//   offsets from a point:          number = offset,   scale = 1,               base = reference_x * width - 0.5
//   offsets within a box:          number = offset,   scale = box_w*width/2P,  base = reference_x * width - 0.5
// so that the derivative with respect to the number is that with respect to the pixel times the scale.
// Corners are numbered 0: (x0, y0), 1: (x0+1, y0), 2: (x0, y0+1), 3: (x0+1, y0+1).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DETR_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DETR_INLINE inline __attribute__((always_inline))
#else
#define DETR_INLINE inline
#endif

namespace detr_family {

// One axis of a point: the pixel before it, the distance to that pixel, whether it and the next one exist.
template <typename T>
struct Axis {
  int32_t pixel;
  T fraction;
  bool first, second;
};

// Pixels exist from 0 to size - 1. NaN, infinities and whatever no int holds count as outside: the comparisons are
// such that NaN becomes -2, two pixels before the first.
template <typename T>
DETR_INLINE Axis<T> locate(T number, T scale, T base, int32_t size) {
  T x = number * scale + base;
  x = x > T(-2) ? x : T(-2);
  x = x < T(size) ? x : T(size);
  int32_t pixel = int32_t(x);  // towards zero ...
  pixel -= T(pixel) > x ? 1 : 0;  // ... now towards minus infinity
  Axis<T> axis;
  axis.pixel = pixel;
  axis.fraction = x - T(pixel);
  axis.first = uint32_t(pixel) < uint32_t(size);
  axis.second = uint32_t(pixel + 1) < uint32_t(size);
  return axis;
}

// Weights of the four corners: bilinear times `attention`.
template <typename T>
DETR_INLINE void corner_weights(T lx, T ly, T attention, T weights[4]) {
  const T lower = attention * ly;
  const T upper = attention - lower;
  weights[1] = upper * lx;
  weights[0] = upper - weights[1];
  weights[3] = lower * lx;
  weights[2] = lower - weights[3];
}

// Derivatives of sum_c weights[c] * dots[c], dots[c] being the dot product of the output's gradient with the value at
// corner c (zero where the corner lies outside).
template <typename T>
struct PointGradient {
  T attention, x, y;  // x and y: per unit of `number`
};

template <typename T>
DETR_INLINE PointGradient<T> point_gradient(T lx, T ly, T attention, T scale_x, T scale_y, const T dots[4]) {
  const T upper_slope = dots[1] - dots[0];  // along x, on the upper row
  const T lower_slope = dots[3] - dots[2];
  const T upper = dots[0] + lx * upper_slope;
  const T lower = dots[2] + lx * lower_slope;
  PointGradient<T> gradient;
  gradient.attention = upper + ly * (lower - upper);
  gradient.x = attention * scale_x * (upper_slope + ly * (lower_slope - upper_slope));
  gradient.y = attention * scale_y * (lower - upper);
  return gradient;
}

// Softmax: with a = softmax(z), dz = a * (da - sum(a * da)).
template <typename T>
DETR_INLINE T softmax_gradient(T attention, T grad_attention, T sum) {
  return attention * (grad_attention - sum);
}

}  // namespace detr_family
