// The arithmetic of sampling points, for the CPU and the CUDA kernels alike (arXiv 2010.04159, equation 3).
//
// It is written for T and I being a float and an int, or vectors of them, one point per lane. It includes nothing and
// opens no namespace: each includer does that, so that the CPU's sets of instructions get versions of their own.
// DETR_INLINE is the includer's too.
//
// A coordinate in pixels is  x = number * scale + base:
//   sampling locations in [0, 1]:  number = location, scale = width,             base = -0.5
//   offsets from a point:          number = offset,   scale = 1,                 base = reference_x * width - 0.5
//   offsets within a box:          number = offset,   scale = box_w * width/2P,  base = reference_x * width - 0.5
// so that the derivative with respect to the number is that with respect to the pixel times the scale.
// Corners are numbered 0: (x0, y0), 1: (x0+1, y0), 2: (x0, y0+1), 3: (x0+1, y0+1).

DETR_INLINE int32_t to_integer(float x) { return int32_t(x); }
DETR_INLINE int32_t to_integer(double x) { return int32_t(x); }
DETR_INLINE void to_number(int32_t i, float& x) { x = float(i); }
DETR_INLINE void to_number(int32_t i, double& x) { x = double(i); }
DETR_INLINE float choose(bool condition, float a, float b) { return condition ? a : b; }
DETR_INLINE double choose(bool condition, double a, double b) { return condition ? a : b; }
DETR_INLINE int32_t choose(bool condition, int32_t a, int32_t b) { return condition ? a : b; }

// One axis of a point: the pixel before it, the distance to that pixel, and whether it and the next one exist, as
// numbers that are negative where they do not: those of two axes are joined by an `or`.
template <typename T, typename I>
struct Axis {
  I pixel;
  T fraction;
  I first, second;
};

// Pixels exist from 0 to size - 1. NaN, infinities and whatever no int holds count as outside: the comparisons are
// such that NaN becomes -2, two pixels before the first.
template <typename T, typename I>
DETR_INLINE void locate(T number, T scale, T base, I size, Axis<T, I>& axis) {
  T end, whole;
  to_number(size, end);
  const T far = end * 0 - 2;
  T x = number * scale + base;
  x = choose(x > far, x, far);
  x = choose(x < end, x, end);
  I pixel = to_integer(x);  // towards zero ...
  to_number(pixel, whole);
  pixel = choose(whole > x, pixel - 1, pixel);  // ... now towards minus infinity
  to_number(pixel, whole);
  axis.pixel = pixel;
  axis.fraction = x - whole;
  axis.first = pixel | (size - 1 - pixel);
  axis.second = (pixel + 1) | (size - 2 - pixel);
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
DETR_INLINE void point_gradient(T lx, T ly, T attention, T scale_x, T scale_y, const T dots[4],
                                PointGradient<T>& gradient) {
  const T upper_slope = dots[1] - dots[0];  // along x, on the upper row
  const T lower_slope = dots[3] - dots[2];
  const T upper = dots[0] + lx * upper_slope;
  const T lower = dots[2] + lx * lower_slope;
  gradient.attention = upper + ly * (lower - upper);
  gradient.x = attention * scale_x * (upper_slope + ly * (lower_slope - upper_slope));
  gradient.y = attention * scale_y * (lower - upper);
}

// Softmax: with a = softmax(z), dz = a * (da - sum(a * da)).
template <typename T, typename S>
DETR_INLINE T softmax_gradient(T attention, T grad_attention, S sum) {
  return attention * (grad_attention - sum);
}
