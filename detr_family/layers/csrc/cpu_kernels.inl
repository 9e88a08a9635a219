// The CPU kernels, in terms of vectors of VECTOR_BYTES bytes. cpu.cpp includes this once per instruction set, within
// a namespace of its own and under that set's target; nothing is included from here, lest a function of the standard
// library be compiled for instructions that a machine lacks.

template <typename T>
struct Simd {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = VECTOR_BYTES / sizeof(T);
};

template <typename T>
static DETR_INLINE typename Simd<T>::Vector& at(T* pointer) {
  return *reinterpret_cast<typename Simd<T>::Vector*>(pointer);
}

template <typename T>
static DETR_INLINE const typename Simd<T>::Vector& at(const T* pointer) {
  return *reinterpret_cast<const typename Simd<T>::Vector*>(pointer);
}

// Sums of neighbours: {a0+a1, a2+a3, ..., b0+b1, ...}.
template <int lanes>
struct Pairs;

#if defined(__clang__)
#define DETR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DETR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
#if VECTOR_BYTES == 64
template <>
struct Pairs<16> {
  typedef int Index __attribute__((vector_size(VECTOR_BYTES), unused));
  template <typename Vector>
  static DETR_INLINE void add(const Vector& a, const Vector& b, Vector& sum) {
    sum = DETR_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
          DETR_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
};
template <>
struct Pairs<8> {
  typedef long long Index __attribute__((vector_size(VECTOR_BYTES), unused));
  template <typename Vector>
  static DETR_INLINE void add(const Vector& a, const Vector& b, Vector& sum) {
    sum = DETR_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
          DETR_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  }
};
#elif VECTOR_BYTES == 32
template <>
struct Pairs<8> {
  typedef int Index __attribute__((vector_size(VECTOR_BYTES), unused));
  template <typename Vector>
  static DETR_INLINE void add(const Vector& a, const Vector& b, Vector& sum) {
    sum = DETR_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
          DETR_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  }
};
template <>
struct Pairs<4> {
  typedef long long Index __attribute__((vector_size(VECTOR_BYTES), unused));
  template <typename Vector>
  static DETR_INLINE void add(const Vector& a, const Vector& b, Vector& sum) {
    sum = DETR_SHUFFLE(a, b, 0, 2, 4, 6) +
          DETR_SHUFFLE(a, b, 1, 3, 5, 7);
  }
};
#else
template <>
struct Pairs<4> {
  typedef int Index __attribute__((vector_size(VECTOR_BYTES), unused));
  template <typename Vector>
  static DETR_INLINE void add(const Vector& a, const Vector& b, Vector& sum) {
    sum = DETR_SHUFFLE(a, b, 0, 2, 4, 6) +
          DETR_SHUFFLE(a, b, 1, 3, 5, 7);
  }
};
#endif
#undef DETR_SHUFFLE

// exp(x) for x <= 0 (NaN stays NaN), to 2 units in the last place of a float.
static DETR_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = float(int32_t(x * 1.44269504f - 0.5f));  // x <= 0: rounds to nearest
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return p * power;
}

static DETR_INLINE double exponential(double x) { return __builtin_exp(x); }

// What is worked out once per query and head for its points, one array per quantity so that the loops over points
// become vector code. The number of points is rounded up to a whole vector; the padding lies outside.
template <typename T>
struct Scratch {
  int32_t count = 0, padded = 0;  // points in all, and rounded up
  T *scale_x, *scale_y, *base_x, *base_y;  // count: see point.h
  int32_t *width, *height, *start;         // count: of the point's level; start counts from the task's first token
  T *attention, *lx, *ly;                  // count
  T* corner[4];                            // padded: weight of each corner
  int64_t* offset[4];                      // padded: where the corner's value lies, in elements from the task's base
  int64_t* grad_offset[4];                 // padded: likewise for grad_value
  T* dots;                                 // padded x 4
  T *zeros, *dump;                         // channels: read, and written, for corners outside
  T *value, *grad_value;                   // tokens x channels: the head's copy, where there is one
  void* memory = nullptr;

  Scratch(const Problem<T>& problem, int32_t levels, int64_t tokens, bool with_grad) {
    constexpr int lanes = 64 / sizeof(T);
    count = levels * problem.points;
    padded = (count + lanes - 1) / lanes * lanes;
    const int64_t row = (problem.channels + lanes - 1) / lanes * lanes;
    const int64_t copy = problem.head_major ? tokens * problem.channels + lanes : 0;
    const int64_t bytes = 64 + padded * (sizeof(T) * 15 + sizeof(int32_t) * 3 + sizeof(int64_t) * 8 + 64) +
                          (row * 2 + copy * (with_grad ? 2 : 1)) * sizeof(T) + 32 * 64;
    memory = __builtin_malloc(bytes);
    char* next = static_cast<char*>(memory);
    auto take = [&next](auto*& pointer, int64_t number) {
      next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64;
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
      next += number * sizeof(*pointer);
    };
    for (T** pointer : {&scale_x, &scale_y, &base_x, &base_y, &attention, &lx, &ly}) take(*pointer, padded);
    for (int32_t** pointer : {&width, &height, &start}) take(*pointer, padded);
    for (int c = 0; c < 4; ++c) {
      take(corner[c], padded);
      take(offset[c], padded);
      take(grad_offset[c], padded);
    }
    take(dots, padded * 4);
    take(zeros, row);
    take(dump, row);
    take(value, copy);
    take(grad_value, with_grad ? copy : 0);
    __builtin_memset(zeros, 0, row * sizeof(T));
    __builtin_memset(dump, 0, row * sizeof(T));
    for (int32_t k = 0; k < padded; ++k) {  // padding: a 1x1 level far from where its points are
      scale_x[k] = scale_y[k] = T(0);
      base_x[k] = base_y[k] = T(-2);
      attention[k] = T(0);
      width[k] = height[k] = 1;
      start[k] = 0;
    }
  }
  ~Scratch() { __builtin_free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// One head's work: the levels [level_begin, level_end) of (b, m).
template <typename T, int D>
struct Head {
  const Problem<T>& problem;
  const int64_t b;
  const int32_t m, level_begin, level_end;
  const int32_t channels;
  int64_t token_begin = 0, token_count = 0;
  int32_t row_stride;
  Scratch<T> scratch;
  const T* base;            // of the values: token token_begin of this head
  T* grad_base = nullptr;   // likewise
  int64_t outside, grad_outside;  // offsets of scratch.zeros and scratch.dump from those bases

  static constexpr int lanes = Simd<T>::lanes;
  using Vector = typename Simd<T>::Vector;

  static int64_t count_tokens(const Problem<T>& problem, int32_t from, int32_t to) {
    int64_t count = 0;
    for (int32_t l = from; l < to; ++l) count += problem.shapes[2 * l] * problem.shapes[2 * l + 1];
    return count;
  }

  // In elements, between two pieces of memory: added to the first it gives the second.
  static int64_t distance(const T* from, const T* to) {
    return (reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from)) / int64_t(sizeof(T));
  }

  Head(const Problem<T>& problem_, int64_t b_, int32_t m_, int32_t from, int32_t to, bool with_grad)
      : problem(problem_), b(b_), m(m_), level_begin(from), level_end(to), channels(D ? D : problem_.channels),
        token_begin(problem_.starts[from]), token_count(count_tokens(problem_, from, to)),
        scratch(problem_, to - from, token_count, with_grad) {
    const int64_t full = int64_t(problem.heads) * channels;
    const int64_t first = (b * problem.tokens + token_begin) * full + int64_t(m) * channels;
    base = problem.value + first;
    if (with_grad) grad_base = problem.grad_value + first;
    row_stride = problem.heads * channels;
    if (problem.head_major) {
      for (int64_t s = 0; s < token_count; ++s) copy_row(scratch.value + s * channels, base + s * full);
      base = scratch.value;
      row_stride = channels;
      if (with_grad) {
        __builtin_memset(scratch.grad_value, 0, token_count * channels * sizeof(T));
        grad_base = scratch.grad_value;
      }
    }
    outside = distance(base, scratch.zeros);
    grad_outside = with_grad ? distance(grad_base, scratch.dump) : 0;
    for (int32_t l = from; l < to; ++l) {
      for (int32_t p = 0; p < problem.points; ++p) {
        const int32_t k = (l - from) * problem.points + p;
        scratch.height[k] = int32_t(problem.shapes[2 * l]);
        scratch.width[k] = int32_t(problem.shapes[2 * l + 1]);
        scratch.start[k] = int32_t(problem.starts[l] - token_begin);
        scratch.scale_x[k] = T(scratch.width[k]);
        scratch.scale_y[k] = T(scratch.height[k]);
        scratch.base_x[k] = scratch.base_y[k] = T(-0.5);
      }
    }
  }

  DETR_INLINE void copy_row(T* __restrict to, const T* __restrict from) const {
    for (int32_t d = 0; d < channels; ++d) to[d] = from[d];
  }

  // B x Q x M: row of (b, q, m)
  DETR_INLINE int64_t row(int64_t q) const { return (b * problem.queries + q) * problem.heads + m; }

  // Softmax over all levels of a query, of which this head's work may be a part.
  DETR_INLINE void softmax(const T* logits) {
    const int32_t all = problem.levels * problem.points;
    T largest = logits[0];
    for (int32_t k = 1; k < all; ++k) largest = logits[k] > largest ? logits[k] : largest;
    T sum = T(0);
    const int32_t first = level_begin * problem.points;
    T* __restrict attention = scratch.attention;
    if (scratch.count == all) {
      for (int32_t k = 0; k < all; ++k) attention[k] = exponential(logits[k] - largest);
      for (int32_t k = 0; k < all; ++k) sum += attention[k];
    } else {
      for (int32_t k = 0; k < all; ++k) sum += exponential(logits[k] - largest);
      for (int32_t k = 0; k < scratch.count; ++k) attention[k] = exponential(logits[first + k] - largest);
    }
    const T factor = T(1) / sum;
    for (int32_t k = 0; k < scratch.count; ++k) attention[k] *= factor;
  }

  // Fills the scratch for query q.
  template <bool with_grad>
  DETR_INLINE void prepare(int64_t q) {
    const int32_t count = scratch.count, padded = scratch.padded;
    const int64_t first = row(q) * problem.levels * problem.points + int64_t(level_begin) * problem.points;
    const T* __restrict numbers = problem.numbers + first * 2;
    T* __restrict attention = scratch.attention;
    T *__restrict scale_x = scratch.scale_x, *__restrict scale_y = scratch.scale_y;
    T *__restrict base_x = scratch.base_x, *__restrict base_y = scratch.base_y;
    const int32_t *__restrict width = scratch.width, *__restrict height = scratch.height;
    const int32_t* __restrict start = scratch.start;
    if (problem.reference == nullptr) {
      for (int32_t k = 0; k < count; ++k) attention[k] = problem.weights[first + k];
    } else {
      softmax(problem.weights + first - int64_t(level_begin) * problem.points);
      const int32_t dims = problem.reference_dims, points = problem.points;
      const T* reference = problem.reference + ((b * problem.queries + q) * problem.levels + level_begin) * dims;
      const T part = T(0.5) / T(points);
      for (int32_t k = 0; k < count; k += points, reference += dims) {
        const T w = T(width[k]), h = T(height[k]);
        const T x = reference[0] * w - T(0.5), y = reference[1] * h - T(0.5);
        const T sx = dims == 2 ? T(1) : reference[2] * w * part, sy = dims == 2 ? T(1) : reference[3] * h * part;
        for (int32_t p = 0; p < points; ++p) {
          base_x[k + p] = x;
          base_y[k + p] = y;
          scale_x[k + p] = sx;
          scale_y[k + p] = sy;
        }
      }
    }
    T* __restrict w0 = scratch.corner[0];
    T* __restrict w1 = scratch.corner[1];
    T* __restrict w2 = scratch.corner[2];
    T* __restrict w3 = scratch.corner[3];
    int64_t* __restrict o0 = scratch.offset[0];
    int64_t* __restrict o1 = scratch.offset[1];
    int64_t* __restrict o2 = scratch.offset[2];
    int64_t* __restrict o3 = scratch.offset[3];
    int64_t* __restrict g0 = scratch.grad_offset[0];
    int64_t* __restrict g1 = scratch.grad_offset[1];
    int64_t* __restrict g2 = scratch.grad_offset[2];
    int64_t* __restrict g3 = scratch.grad_offset[3];
    T *__restrict lx = scratch.lx, *__restrict ly = scratch.ly;
    const int32_t stride = row_stride;
    for (int32_t k = 0; k < padded; ++k) {
      // Beyond `count` the scale is zero and the base outside; numbers[0] is there to be read.
      const int32_t i = k < count ? k : 0;
      const Axis<T> x = locate(numbers[2 * i], scale_x[k], base_x[k], width[k]);
      const Axis<T> y = locate(numbers[2 * i + 1], scale_y[k], base_y[k], height[k]);
      const bool in0 = x.first & y.first, in1 = x.second & y.first;
      const bool in2 = x.first & y.second, in3 = x.second & y.second;
      T weights[4];
      corner_weights(x.fraction, y.fraction, attention[k], weights);
      w0[k] = in0 ? weights[0] : T(0);
      w1[k] = in1 ? weights[1] : T(0);
      w2[k] = in2 ? weights[2] : T(0);
      w3[k] = in3 ? weights[3] : T(0);
      // The token's number fits 32 bits, its offset in elements need not.
      const int32_t token = start[k] + y.pixel * width[k] + x.pixel;
      const int64_t upper = int64_t(token) * stride, lower = int64_t(token + width[k]) * stride;
      o0[k] = in0 ? upper : outside;
      o1[k] = in1 ? upper + stride : outside;
      o2[k] = in2 ? lower : outside;
      o3[k] = in3 ? lower + stride : outside;
      if (with_grad) {
        lx[k] = x.fraction;
        ly[k] = y.fraction;
        g0[k] = in0 ? upper : grad_outside;
        g1[k] = in1 ? upper + stride : grad_outside;
        g2[k] = in2 ? lower : grad_outside;
        g3[k] = in3 ? lower + stride : grad_outside;
      }
    }
  }

  // output[b, q, m] = sum over points and corners of weight times value
  DETR_INLINE void gather(int64_t q) {
    T* __restrict output = problem.output + row(q) * channels;
    const int32_t count = scratch.count;
    if constexpr (D != 0 && D % lanes == 0) {
      constexpr int parts = D / lanes;
      Vector upper[parts] = {}, lower[parts] = {};  // two sums each, so that one need not wait for the other
      for (int32_t k = 0; k < count; ++k) {
        const T* p0 = base + scratch.offset[0][k];
        const T* p1 = base + scratch.offset[1][k];
        const T* p2 = base + scratch.offset[2][k];
        const T* p3 = base + scratch.offset[3][k];
        const T a = scratch.corner[0][k], e = scratch.corner[1][k];
        const T c = scratch.corner[2][k], f = scratch.corner[3][k];
        for (int i = 0; i < parts; ++i) {
          upper[i] += at(p0 + i * lanes) * a;
          lower[i] += at(p2 + i * lanes) * c;
          upper[i] += at(p1 + i * lanes) * e;
          lower[i] += at(p3 + i * lanes) * f;
        }
      }
      for (int i = 0; i < parts; ++i) at(output + i * lanes) = upper[i] + lower[i];
    } else {
      int32_t d = 0;
      for (; d + lanes <= channels; d += lanes) {
        Vector sum = {};
        for (int32_t k = 0; k < count; ++k)
          for (int c = 0; c < 4; ++c) sum += at(base + scratch.offset[c][k] + d) * scratch.corner[c][k];
        at(output + d) = sum;
      }
      for (; d < channels; ++d) {
        T sum = T(0);
        for (int32_t k = 0; k < count; ++k)
          for (int c = 0; c < 4; ++c) sum += base[scratch.offset[c][k] + d] * scratch.corner[c][k];
        output[d] = sum;
      }
    }
  }

  // dots[k, c] = grad_output . value at corner c of point k, and grad_value at that corner += weight * grad_output
  DETR_INLINE void scatter(int64_t q) {
    const T* grad = problem.grad_output + row(q) * channels;
    if constexpr (D != 0 && D % lanes == 0) {
      constexpr int parts = D / lanes;
      constexpr int group = lanes / 4 > 0 ? lanes / 4 : 1;  // points whose dot products one vector holds
      Vector own[parts];
      for (int i = 0; i < parts; ++i) own[i] = at(grad + i * lanes);
      if constexpr (lanes >= 4) {
        for (int32_t k = 0; k < scratch.padded; k += group) {
          if (k >= scratch.count) break;
          Vector partial[lanes];
#pragma GCC unroll 16
          for (int j = 0; j < lanes; ++j) {
            const T* p = base + scratch.offset[j % 4][k + j / 4];
            Vector product = at(p) * own[0];
            for (int i = 1; i < parts; ++i) product += at(p + i * lanes) * own[i];
            partial[j] = product;
          }
#pragma GCC unroll 16
          for (int j = 0; j < lanes; ++j) {
            T* p = grad_base + scratch.grad_offset[j % 4][k + j / 4];
            const T weight = scratch.corner[j % 4][k + j / 4];
            for (int i = 0; i < parts; ++i) at(p + i * lanes) += own[i] * weight;
          }
          reduce(partial, scratch.dots + k * 4);
        }
        return;
      }
    }
    for (int32_t k = 0; k < scratch.count; ++k) {
      for (int c = 0; c < 4; ++c) {
        const T* p = base + scratch.offset[c][k];
        T* g = grad_base + scratch.grad_offset[c][k];
        const T weight = scratch.corner[c][k];
        T dot = T(0);
        for (int32_t d = 0; d < channels; ++d) {
          dot += p[d] * grad[d];
          g[d] += weight * grad[d];
        }
        scratch.dots[k * 4 + c] = dot;
      }
    }
  }

  // Sum over lanes of each of `lanes` vectors, as one vector.
  static DETR_INLINE void reduce(Vector* partial, T* sums) {
#pragma GCC unroll 8
    for (int step = lanes / 2; step >= 1; step /= 2) {
#pragma GCC unroll 16
      for (int j = 0; j < step; ++j) Pairs<lanes>::add(partial[2 * j], partial[2 * j + 1], partial[j]);
    }
    at(sums) = partial[0];
  }

  // From the dots to the gradients of numbers and weights (of the softmax's output, where there is one).
  DETR_INLINE void finish(int64_t q) {
    const int64_t first = row(q) * problem.levels * problem.points + int64_t(level_begin) * problem.points;
    T* __restrict grad_numbers = problem.grad_numbers + first * 2;
    T* __restrict grad_weights = problem.grad_weights + first;
    const T* __restrict dots = scratch.dots;
    const T *__restrict lx = scratch.lx, *__restrict ly = scratch.ly, *__restrict attention = scratch.attention;
    const T *__restrict scale_x = scratch.scale_x, *__restrict scale_y = scratch.scale_y;
    for (int32_t k = 0; k < scratch.count; ++k) {
      const PointGradient<T> gradient =
          point_gradient(lx[k], ly[k], attention[k], scale_x[k], scale_y[k], dots + 4 * k);
      grad_weights[k] = gradient.attention;
      grad_numbers[2 * k] = gradient.x;
      grad_numbers[2 * k + 1] = gradient.y;
    }
    if (problem.reference != nullptr && scratch.count == problem.levels * problem.points) {
      T sum = T(0);
      for (int32_t k = 0; k < scratch.count; ++k) sum += attention[k] * grad_weights[k];
      for (int32_t k = 0; k < scratch.count; ++k)
        grad_weights[k] = softmax_gradient(attention[k], grad_weights[k], sum);
    }
  }

  void forward(int64_t query_begin, int64_t query_end) {
    for (int64_t q = query_begin; q < query_end; ++q) {
      prepare<false>(q);
      gather(q);
    }
  }

  void backward() {
    for (int64_t q = 0; q < problem.queries; ++q) {
      prepare<true>(q);
      scatter(q);
      finish(q);
    }
    if (problem.head_major) {
      const int64_t full = int64_t(problem.heads) * channels;
      T* to = problem.grad_value + (b * problem.tokens + token_begin) * full + int64_t(m) * channels;
      for (int64_t s = 0; s < token_count; ++s) copy_row(to + s * full, scratch.grad_value + s * channels);
    }
  }
};

template <typename T, int D>
static void forward_of(const Problem<T>& problem, int64_t b, int32_t m, int64_t query_begin, int64_t query_end) {
  Head<T, D>(problem, b, m, 0, problem.levels, false).forward(query_begin, query_end);
}

template <typename T, int D>
static void backward_of(const Problem<T>& problem, int64_t b, int32_t m, int32_t level_begin, int32_t level_end) {
  Head<T, D>(problem, b, m, level_begin, level_end, true).backward();
}

// Where the backward ran level by level: the softmax's own derivative, over rows of L*P logits.
template <typename T>
static void softmax_backward(const Problem<T>& problem, int64_t row_begin, int64_t row_end) {
  const int32_t count = problem.levels * problem.points;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* logits = problem.weights + r * count;
    T* grad = problem.grad_weights + r * count;
    T largest = logits[0], sum = T(0), dot = T(0);
    for (int32_t k = 1; k < count; ++k) largest = logits[k] > largest ? logits[k] : largest;
    for (int32_t k = 0; k < count; ++k) {
      const T power = exponential(logits[k] - largest);
      sum += power;
      dot += power * grad[k];
    }
    const T factor = T(1) / sum;
    for (int32_t k = 0; k < count; ++k)
      grad[k] = softmax_gradient(exponential(logits[k] - largest) * factor, grad[k], dot * factor);
  }
}

template <typename T>
static Kernels<T> kernels(int32_t channels) {
  switch (channels) {
    case 16: return {forward_of<T, 16>, backward_of<T, 16>, softmax_backward<T>};
    case 32: return {forward_of<T, 32>, backward_of<T, 32>, softmax_backward<T>};
    case 64: return {forward_of<T, 64>, backward_of<T, 64>, softmax_backward<T>};
    default: return {forward_of<T, 0>, backward_of<T, 0>, softmax_backward<T>};
  }
}
