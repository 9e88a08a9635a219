// The kernels of deformable attention on the CPU, in terms of vectors; see every_instruction_set.inl.

#include "vectors.inl"

#include "point.inl"  // after the functions of vectors that it is to find

// The reordering of two vectors a and b, read as one of twice the length.
#if defined(__clang__)
#define DETR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DETR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename Simd<T>::Integers{__VA_ARGS__})
#endif

template <typename T, typename Sequence = std::make_integer_sequence<int, Simd<T>::lanes>>
struct Order;

template <typename T, int... i>
struct Order<T, std::integer_sequence<int, i...>> {
  using Vector = typename Simd<T>::Vector;
  static constexpr int lanes = Simd<T>::lanes;
  static DETR_INLINE Vector even(Vector a, Vector b) { return DETR_SHUFFLE(a, b, (2 * i)...); }
  static DETR_INLINE Vector odd(Vector a, Vector b) { return DETR_SHUFFLE(a, b, (2 * i + 1)...); }
  // a0 b0 a1 b1 ...: the first and the second half
  static DETR_INLINE Vector zip_first(Vector a, Vector b) { return DETR_SHUFFLE(a, b, (i / 2 + i % 2 * lanes)...); }
  static DETR_INLINE Vector zip_second(Vector a, Vector b) {
    return DETR_SHUFFLE(a, b, (i / 2 + lanes / 2 + i % 2 * lanes)...);
  }
};
#undef DETR_SHUFFLE

// exp(x) for x <= 0 (NaN stays NaN), to 2 units in the last place of a float.
static DETR_INLINE Floats exponential(Floats x) {
  const Floats lowest = Floats{} - 87.0f;
  x = choose(x < lowest, lowest, x);
  const Ints exponent = to_integer(x * 1.44269504f - 0.5f);  // x <= 0: rounds to nearest
  Floats n;
  to_number(exponent, n);
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Floats)((exponent + 127) << 23);  // the bits of 2^exponent
}

static DETR_INLINE Doubles exponential(Doubles x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Softmax of `count` logits, in place; the array goes on to a whole vector and its padding becomes 0.
template <typename T>
static DETR_INLINE void softmax(T* numbers, int32_t count, int32_t padded) {
  using Vector = typename Simd<T>::Vector;
  constexpr int lanes = Simd<T>::lanes;
  for (int32_t k = count; k < padded; ++k) numbers[k] = -__builtin_inf();
  Vector largest = at(numbers);
  for (int32_t k = lanes; k < padded; k += lanes) {
    const Vector other = at(numbers + k);
    largest = choose(other > largest, other, largest);
  }
  T lane[lanes];
  at(lane) = largest;
  for (int step = lanes / 2; step >= 1; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] = lane[i + step] > lane[i] ? lane[i + step] : lane[i];
  const T top = lane[0];
  Vector sum = {};
  for (int32_t k = 0; k < padded; k += lanes) {
    const Vector power = exponential(at(numbers + k) - top);
    at(numbers + k) = power;
    sum += power;
  }
  // In the padding is exp(-87) at most, too little to show in a sum that holds exp(0).
  at(lane) = sum;
  for (int step = lanes / 2; step >= 1; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  const T factor = T(1) / lane[0];
  for (int32_t k = 0; k < padded; k += lanes) at(numbers + k) *= factor;
}

// What is worked out once per query and head for its points, one array per quantity. The number of points is rounded
// up to whole vectors; the padding lies outside every level.
template <typename T>
struct Points {
  using Integer = typename Simd<T>::Integer;
  T *scale_x, *scale_y;          // padded: see point.inl
  T *base_x, *base_y;            // padded: likewise
  T *attention, *lx, *ly;        // padded
  T* corner[4];                  // padded: weight of each corner
  Integer* token[4];             // padded: the corner's token, `outside` where there is none
};

template <typename T>
struct Scratch {
  using Integer = typename Simd<T>::Integer;
  int32_t count = 0, padded = 0;           // points in all, and rounded up
  Points<T> points[3];                     // of the query at work, of the next and of the one after: what was just
                                           // written is slow to read in pieces of another size
  Integer *width, *height, *start;         // padded: of the point's level; start counts from the task's first token,
                                           // or from the copies'
  Integer* outside;                        // padded: -1, or the copies' last row
  T *number, *dots, *grad_attention;       // padded x 2, x 4 and x 1
  T *softmax_all, *zeros, *dump;           // all points of a query; channels: read, and written, for corners outside,
                                           // or the output before it is narrowed
  T *value, *grad_value;                   // (copied tokens + 1) x channels: the head's copies
  void* memory = nullptr;

  Scratch(const Problem<T>& problem, int32_t levels, int64_t copied_tokens, bool with_grad) {
    constexpr int lanes = 64 / sizeof(T);
    const auto round_up = [](int64_t number) { return (number + lanes - 1) / lanes * lanes; };
    count = levels * problem.points;
    padded = int32_t(round_up(count));
    const int64_t row = round_up(problem.channels);
    const int64_t all = round_up(int64_t(problem.levels) * problem.points);
    const int64_t copy = copied_tokens > 0 ? round_up((copied_tokens + 1) * problem.channels) : 0;
    memory = __builtin_malloc((60 * padded + all + 2 * row + (with_grad ? 2 : 1) * copy) * sizeof(T) + 64 * 64);
    char* next = static_cast<char*>(memory);
    const auto take = [&next](auto*& pointer, int64_t number) {
      next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64;
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
      next += number * sizeof(*pointer);
    };
    for (Points<T>& set : points) {
      for (T** pointer : {&set.scale_x, &set.scale_y, &set.base_x, &set.base_y, &set.attention, &set.lx, &set.ly}) take(*pointer, padded);
      for (int c = 0; c < 4; ++c) {
        take(set.corner[c], padded);
        take(set.token[c], padded);
      }
    }
    take(grad_attention, padded);
    for (Integer** pointer : {&width, &height, &start, &outside}) take(*pointer, padded);
    take(number, padded * 2);
    take(dots, padded * 4);
    take(softmax_all, all);
    take(zeros, row);
    take(dump, row);
    take(value, copy);
    take(grad_value, with_grad ? copy : 0);
    __builtin_memset(zeros, 0, row * sizeof(T));
    __builtin_memset(dump, 0, row * sizeof(T));
    __builtin_memset(number, 0, 2 * padded * sizeof(T));
    __builtin_memset(dots, 0, 4 * padded * sizeof(T));
    for (int32_t k = 0; k < padded; ++k) {  // padding: a 1x1 level far from where its points are
      for (Points<T>& set : points) {
        set.scale_x[k] = set.scale_y[k] = set.attention[k] = T(0);
        set.base_x[k] = set.base_y[k] = T(-2);
      }
      width[k] = height[k] = 1;
      start[k] = 0;
      outside[k] = Integer(copied_tokens > 0 ? copied_tokens : -1);
    }
  }
  ~Scratch() { __builtin_free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// One head's work: the levels [level_begin, level_end) of (b, m). D is the number of channels, 0 for any. Of the points
// those from `split` on lie in levels that the head has copied: their values are gathered from the copy (and gradients
// added to another), whose last row stands for all outside.
template <typename T, int D>
struct Head {
  using Vector = typename Simd<T>::Vector;
  using Integer = typename Simd<T>::Integer;
  using Integers = typename Simd<T>::Integers;
  static constexpr int lanes = Simd<T>::lanes;
  static constexpr int group = lanes / 4;  // points whose corners' dot products one vector holds
  static constexpr int32_t ahead = 6;  // queries between a prefetch and its use
  static constexpr int32_t rows_ahead = 24;  // tokens, likewise
  static constexpr int32_t line = 64 / sizeof(T);  // of the cache, in numbers

  const Problem<T>& problem;
  const int64_t b;
  const int32_t m, level_begin, level_end;
  const int32_t channels;
  const int32_t level_copied, split;   // the first copied level, and point
  const int64_t full;                  // numbers from a token to the next in the value itself
  const int64_t copied_count;          // tokens
  Scratch<T> scratch;
  const T* base;                       // of the values: token 0 of this head
  T* grad_base = nullptr;              // likewise

  static int64_t count_tokens(const Problem<T>& problem, int32_t from, int32_t to) {
    int64_t count = 0;
    for (int32_t l = from; l < to; ++l) count += problem.shapes[2 * l] * problem.shapes[2 * l + 1];
    return count;
  }

  static int32_t between(int32_t least, int32_t number, int32_t most) {
    return number < least ? least : number > most ? most : number;
  }

  Head(const Problem<T>& problem_, int64_t b_, int32_t m_, int32_t from, int32_t to, bool with_grad)
      : problem(problem_), b(b_), m(m_), level_begin(from), level_end(to), channels(D ? D : problem_.channels),
        level_copied(between(from, problem_.first_copied, to)), split((level_copied - from) * problem_.points),
        full(int64_t(problem_.heads) * channels), copied_count(count_tokens(problem_, level_copied, to)),
        scratch(problem_, to - from, copied_count, with_grad) {
    const int64_t first = b * problem.tokens * full + int64_t(m) * channels;
    const bool same = problem.stored == Stored::same;
    base = same ? problem.value + first : nullptr;
    if (with_grad && same) grad_base = problem.grad_value + first;
    const int64_t copy_begin = copied_count > 0 ? problem.starts[level_copied] : 0;
    if (copied_count > 0) {
      if (same) {
        const T* source = base + copy_begin * full;
        for (int64_t s = 0; s < copied_count; ++s) {
          for (int32_t d = 0; d < channels; d += line) __builtin_prefetch(source + (s + rows_ahead) * full + d);
          copy_row(scratch.value + s * channels, source + s * full);
        }
      } else if constexpr (sizeof(T) == sizeof(float)) {
        const uint16_t* source = problem.narrow_value + first + copy_begin * full;
        for (int64_t s = 0; s < copied_count; ++s) {
          for (int32_t d = 0; d < channels; d += 2 * line) __builtin_prefetch(source + (s + rows_ahead) * full + d);
          widen_row(problem.stored, scratch.value + s * channels, source + s * full, channels);
        }
      }
      __builtin_memset(scratch.value + copied_count * channels, 0, channels * sizeof(T));
      if (with_grad) __builtin_memset(scratch.grad_value, 0, (copied_count + 1) * channels * sizeof(T));
    }
    for (int32_t l = from; l < to; ++l) {
      for (int32_t p = 0; p < problem.points; ++p) {
        const int32_t k = (l - from) * problem.points + p;
        scratch.height[k] = Integer(problem.shapes[2 * l]);
        scratch.width[k] = Integer(problem.shapes[2 * l + 1]);
        scratch.start[k] = Integer(problem.starts[l] - (l < level_copied ? 0 : copy_begin));
        scratch.outside[k] = Integer(l < level_copied ? -1 : copied_count);
        for (Points<T>& set : scratch.points) {
          // of a location; of an offset from a point it is 1 (`refer` sets all else that differs)
          set.scale_x[k] = problem.reference == nullptr ? T(scratch.width[k]) : T(1);
          set.scale_y[k] = problem.reference == nullptr ? T(scratch.height[k]) : T(1);
          set.base_x[k] = set.base_y[k] = T(-0.5);
        }
      }
    }
  }

  DETR_INLINE void copy_row(T* __restrict to, const T* __restrict from) const {
    for (int32_t d = 0; d < channels; ++d) to[d] = from[d];
  }

  // B x Q x M: row of (b, q, m), and of its first point in B x Q x M x L x P
  DETR_INLINE int64_t row(int64_t q) const { return (b * problem.queries + q) * problem.heads + m; }
  DETR_INLINE int64_t point(int64_t q) const {
    return (row(q) * problem.levels + level_begin) * int64_t(problem.points);
  }

  // Corners: where the value lies, and where its gradient goes.
  template <bool copied>
  DETR_INLINE const T* value_at(const Points<T>& set, int c, int32_t k) const {
    const int64_t token = set.token[c][k];
    if (copied) return scratch.value + token * (D ? D : channels);
    return token < 0 ? scratch.zeros : base + token * full;
  }
  template <bool copied>
  DETR_INLINE T* grad_at(const Points<T>& set, int c, int32_t k) const {
    const int64_t token = set.token[c][k];
    if (copied) return scratch.grad_value + token * (D ? D : channels);
    return token < 0 ? scratch.dump : grad_base + token * full;
  }
  DETR_INLINE const T* value_of(const Points<T>& set, int c, int32_t k) const {
    return k < split ? value_at<false>(set, c, k) : value_at<true>(set, c, k);
  }
  DETR_INLINE T* grad_of(const Points<T>& set, int c, int32_t k) const {
    return k < split ? grad_at<false>(set, c, k) : grad_at<true>(set, c, k);
  }

  // The softmax runs over all levels of a query, of which this head's work may be a part.
  DETR_INLINE void attend(int64_t q, Points<T>& set) {
    const int32_t all = problem.levels * problem.points, first = level_begin * problem.points;
    const T* logits = problem.weights + point(q) - first;
    T* target = scratch.count == all ? set.attention : scratch.softmax_all;
    for (int32_t k = 0; k < all; ++k) target[k] = logits[k];
    softmax(target, all, (all + lanes - 1) / lanes * lanes);
    if (target != set.attention)
      for (int32_t k = 0; k < scratch.count; ++k) set.attention[k] = target[first + k];
  }

  // Scale and base of each point from the query's reference points or boxes.
  DETR_INLINE void refer(int64_t q, Points<T>& set) {
    const int32_t dims = problem.reference_dims, points = problem.points;
    const T* reference = problem.reference + ((b * problem.queries + q) * problem.levels + level_begin) * dims;
    const T part = T(0.5) / T(points);
    for (int32_t k = 0; k < scratch.count; k += points, reference += dims) {
      const T w = T(scratch.width[k]), h = T(scratch.height[k]);
      const T x = reference[0] * w - T(0.5), y = reference[1] * h - T(0.5);
      for (int32_t p = 0; p < points; ++p) {
        set.base_x[k + p] = x;
        set.base_y[k + p] = y;
      }
      if (dims == 2) continue;
      const T sx = reference[2] * w * part, sy = reference[3] * h * part;
      for (int32_t p = 0; p < points; ++p) {
        set.scale_x[k + p] = sx;
        set.scale_y[k + p] = sy;
      }
    }
  }

  // What query q has in the fused form only.
  DETR_INLINE void read(int64_t q, Points<T>& set) {
    if (problem.reference == nullptr) return;
    attend(q, set);
    refer(q, set);
  }

  // Fills the scratch for query q, which has been read.
  template <bool with_grad>
  DETR_INLINE void prepare(int64_t q, Points<T>& set) {
    const int32_t count = scratch.count, padded = (count + lanes - 1) / lanes * lanes;
    const T* numbers = problem.numbers + point(q) * 2;
    const T* attention = set.attention;
    const int64_t next = point(q + ahead);
    for (int32_t k = 0; k < count; k += 64 / sizeof(T)) {
      __builtin_prefetch(problem.numbers + next * 2 + k * 2);
      __builtin_prefetch(problem.numbers + next * 2 + k * 2 + 64 / sizeof(T));
      __builtin_prefetch(problem.weights + next + k);
    }
    if (problem.reference == nullptr) {
      if (count == padded) {
        attention = problem.weights + point(q);
      } else {
        for (int32_t k = 0; k < count; ++k) set.attention[k] = problem.weights[point(q) + k];
      }
    }
    if (count != padded) {
      for (int32_t k = 0; k < 2 * count; ++k) scratch.number[k] = numbers[k];
      numbers = scratch.number;
    }
    for (int32_t k = 0; k < padded; k += lanes) {
      const Vector one = at(numbers + 2 * k), two = at(numbers + 2 * k + lanes);
      const Vector weight = at(attention + k);
      const Integers width = *reinterpret_cast<const Integers*>(scratch.width + k);
      const Integers height = *reinterpret_cast<const Integers*>(scratch.height + k);
      const Integers start = *reinterpret_cast<const Integers*>(scratch.start + k);
      const Integers outside = *reinterpret_cast<const Integers*>(scratch.outside + k);
      Axis<Vector, Integers> x, y;
      locate(Order<T>::even(one, two), Vector(at(set.scale_x + k)), Vector(at(set.base_x + k)), width, x);
      locate(Order<T>::odd(one, two), Vector(at(set.scale_y + k)), Vector(at(set.base_y + k)), height, y);
      const Integers outer[4] = {x.first | y.first, x.second | y.first, x.first | y.second, x.second | y.second};
      const Integers token = start + y.pixel * width + x.pixel;
      const Integers tokens[4] = {token, token + 1, token + width, token + width + 1};
      Vector weights[4];
      corner_weights(x.fraction, y.fraction, weight, weights);
      for (int c = 0; c < 4; ++c) {
        at(set.corner[c] + k) = choose(outer[c] < 0, Vector{}, weights[c]);
        *reinterpret_cast<Integers*>(set.token[c] + k) = choose(outer[c] < 0, outside, tokens[c]);
      }
      if (with_grad) {
        at(set.lx + k) = x.fraction;
        at(set.ly + k) = y.fraction;
        if (attention != set.attention) at(set.attention + k) = weight;
      }
    }
  }

  // Adds the points [from, to) to two sums for each part of the channels, so that one need not wait for the other.
  template <bool copied, int parts>
  DETR_INLINE void gather(const Points<T>& set, int32_t from, int32_t to, Vector (&upper)[parts],
                          Vector (&lower)[parts]) const {
    for (int32_t k = from; k < to; ++k) {
      const T* p[4] = {value_at<copied>(set, 0, k), value_at<copied>(set, 1, k), value_at<copied>(set, 2, k),
                       value_at<copied>(set, 3, k)};
      for (int i = 0; i < parts; ++i) {
        upper[i] += at(p[0] + i * lanes) * set.corner[0][k];
        lower[i] += at(p[2] + i * lanes) * set.corner[2][k];
        upper[i] += at(p[1] + i * lanes) * set.corner[1][k];
        lower[i] += at(p[3] + i * lanes) * set.corner[3][k];
      }
    }
  }

  // Asks for what the points of a later query need from levels without a copy: they lie anywhere in memory.
  template <bool with_grad>
  DETR_INLINE void fetch(const Points<T>& set) const {
    for (int32_t k = 0; k < split; ++k) {
      for (int c = 0; c < 4; ++c) {
        const T* p = value_at<false>(set, c, k);
        for (int32_t d = 0; d < channels; d += line) __builtin_prefetch(p + d);
        if (with_grad) {
          const T* g = grad_at<false>(set, c, k);
          for (int32_t d = 0; d < channels; d += line) __builtin_prefetch(g + d, 1);
        }
      }
    }
  }

  // output[b, q, m] = sum over points and corners of weight times value
  DETR_INLINE void gather(int64_t q, const Points<T>& set) {
    const bool same = problem.stored == Stored::same;
    T* output = same ? problem.output + row(q) * channels : scratch.dump;
    const int32_t count = scratch.count;
    if constexpr (D != 0 && D % lanes == 0) {
      constexpr int parts = D / lanes;
      Vector upper[parts] = {}, lower[parts] = {};
      gather<false, parts>(set, 0, split, upper, lower);
      gather<true, parts>(set, split, count, upper, lower);
      for (int i = 0; i < parts; ++i) at(output + i * lanes) = upper[i] + lower[i];
    } else {
      int32_t d = 0;
      for (; d + lanes <= channels; d += lanes) {
        Vector sum = {};
        for (int32_t k = 0; k < count; ++k)
          for (int c = 0; c < 4; ++c) sum += at(value_of(set, c, k) + d) * set.corner[c][k];
        at(output + d) = sum;
      }
      for (; d < channels; ++d) {
        T sum = T(0);
        for (int32_t k = 0; k < count; ++k)
          for (int c = 0; c < 4; ++c) sum += value_of(set, c, k)[d] * set.corner[c][k];
        output[d] = sum;
      }
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (!same) narrow_row(problem.stored, problem.narrow_output + row(q) * channels, output, channels);
    }
  }

  // As below, for the points [from, to) and some more: whole groups of them.
  template <bool copied, int parts>
  DETR_INLINE void scatter(const Points<T>& set, int32_t from, int32_t to, const Vector (&own)[parts]) {
    for (int32_t k = from; k < to; k += group) {
      Vector partial[lanes];
#pragma GCC unroll 16
      for (int j = 0; j < lanes; ++j) {
        const T* p = value_at<copied>(set, j % 4, k + j / 4);
        Vector product = at(p) * own[0];
        for (int i = 1; i < parts; ++i) product += at(p + i * lanes) * own[i];
        partial[j] = product;
      }
#pragma GCC unroll 16
      for (int j = 0; j < lanes; ++j) {
        T* p = grad_at<copied>(set, j % 4, k + j / 4);
        for (int i = 0; i < parts; ++i) at(p + i * lanes) += own[i] * set.corner[j % 4][k + j / 4];
      }
      // Sum over the lanes of each of the vectors, as one vector.
#pragma GCC unroll 8
      for (int step = lanes / 2; step >= 1; step /= 2) {
#pragma GCC unroll 16
        for (int j = 0; j < step; ++j)
          partial[j] = Order<T>::even(partial[2 * j], partial[2 * j + 1]) +
                       Order<T>::odd(partial[2 * j], partial[2 * j + 1]);
      }
      at(scratch.dots + k * 4) = partial[0];
    }
  }

  // dots[k, c] = grad_output . value at corner c of point k, and grad_value at that corner += weight * grad_output
  DETR_INLINE void scatter(int64_t q, const Points<T>& set) {
    const T* grad = problem.grad_output + row(q) * channels;
    __builtin_prefetch(problem.grad_output + row(q + ahead) * channels);
    __builtin_prefetch(problem.grad_output + row(q + ahead) * channels + 64 / sizeof(T));
    if constexpr (D != 0 && D % lanes == 0 && lanes >= 4) {
      constexpr int parts = D / lanes;
      Vector own[parts];
      for (int i = 0; i < parts; ++i) own[i] = at(grad + i * lanes);
      scatter<false, parts>(set, 0, split, own);
      scatter<true, parts>(set, split, scratch.count, own);
    } else {
      for (int32_t k = 0; k < scratch.count; ++k) {
        for (int c = 0; c < 4; ++c) {
          const T* __restrict p = value_of(set, c, k);
          T* __restrict g = grad_of(set, c, k);
          const T weight = set.corner[c][k];
          T dot = T(0);
          for (int32_t d = 0; d < channels; ++d) {
            dot += p[d] * grad[d];
            g[d] += weight * grad[d];
          }
          scratch.dots[k * 4 + c] = dot;
        }
      }
    }
  }

  // From the dots to the gradients of numbers and weights (of the softmax's output, where there is one).
  DETR_INLINE void finish(int64_t q, const Points<T>& set) {
    const int32_t count = scratch.count, padded = (count + lanes - 1) / lanes * lanes;
    T* grad_numbers = problem.grad_numbers + point(q) * 2;
    T* grad_weights = problem.grad_weights + point(q);
    const bool through_softmax = problem.reference != nullptr && count == problem.levels * problem.points;
    T* to_numbers = count == padded ? grad_numbers : scratch.number;
    T* to_weights = count == padded && !through_softmax ? grad_weights : scratch.grad_attention;
    Vector sum = {};
    for (int32_t k = 0; k < padded; k += lanes) {
      const T* from = scratch.dots + 4 * k;
      const Vector v[4] = {at(from), at(from + lanes), at(from + 2 * lanes), at(from + 3 * lanes)};
      const Vector even[2] = {Order<T>::even(v[0], v[1]), Order<T>::even(v[2], v[3])};
      const Vector odd[2] = {Order<T>::odd(v[0], v[1]), Order<T>::odd(v[2], v[3])};
      const Vector dots[4] = {Order<T>::even(even[0], even[1]), Order<T>::even(odd[0], odd[1]),
                              Order<T>::odd(even[0], even[1]), Order<T>::odd(odd[0], odd[1])};
      const Vector attention = at(set.attention + k);
      PointGradient<Vector> gradient;
      point_gradient(Vector(at(set.lx + k)), Vector(at(set.ly + k)), attention,
                     Vector(at(set.scale_x + k)), Vector(at(set.scale_y + k)), dots, gradient);
      at(to_weights + k) = gradient.attention;
      at(to_numbers + 2 * k) = Order<T>::zip_first(gradient.x, gradient.y);
      at(to_numbers + 2 * k + lanes) = Order<T>::zip_second(gradient.x, gradient.y);
      if (through_softmax) sum += attention * gradient.attention;
    }
    if (through_softmax) {
      T total = T(0);
      for (int i = 0; i < lanes; ++i) total += sum[i];
      for (int32_t k = 0; k < padded; k += lanes)
        at(to_weights + k) = softmax_gradient(Vector(at(set.attention + k)), Vector(at(to_weights + k)), total);
    }
    if (to_weights != grad_weights)
      for (int32_t k = 0; k < count; ++k) grad_weights[k] = to_weights[k];
    if (to_numbers != grad_numbers)
      for (int32_t k = 0; k < 2 * count; ++k) grad_numbers[k] = to_numbers[k];
  }

  // Calls work(q, set) for the queries [begin, end), two of which are read and prepared ahead.
  template <bool with_grad, typename Work>
  DETR_INLINE void each_query(int64_t begin, int64_t end, const Work& work) {
    Points<T>*now = &scratch.points[0], *next = &scratch.points[1], *later = &scratch.points[2];
    if (begin < end) {
      read(begin, *now);
      prepare<with_grad>(begin, *now);
    }
    if (begin + 1 < end) read(begin + 1, *next);
    for (int64_t q = begin; q < end; ++q) {
      if (q + 1 < end) {
        prepare<with_grad>(q + 1, *next);
        fetch<with_grad>(*next);
      }
      if (q + 2 < end) read(q + 2, *later);
      work(q, *now);
      Points<T>* free = now;
      now = next;
      next = later;
      later = free;
    }
  }

  void forward(int64_t query_begin, int64_t query_end) {
    each_query<false>(query_begin, query_end, [this](int64_t q, const Points<T>& set) { gather(q, set); });
  }

  void backward() {
    each_query<true>(0, problem.queries, [this](int64_t q, const Points<T>& set) {
      scatter(q, set);
      finish(q, set);
    });
    if (copied_count > 0) {
      const int64_t copy_begin = problem.starts[level_copied] * full;
      if (problem.stored == Stored::same) {
        T* to = grad_base + copy_begin;
        for (int64_t s = 0; s < copied_count; ++s) {
          for (int32_t d = 0; d < channels; d += line) __builtin_prefetch(to + (s + rows_ahead) * full + d, 1);
          copy_row(to + s * full, scratch.grad_value + s * channels);
        }
      } else if constexpr (sizeof(T) == sizeof(float)) {
        uint16_t* to = problem.narrow_grad_value + b * problem.tokens * full + int64_t(m) * channels + copy_begin;
        for (int64_t s = 0; s < copied_count; ++s) {
          for (int32_t d = 0; d < channels; d += 2 * line) __builtin_prefetch(to + (s + rows_ahead) * full + d, 1);
          narrow_row(problem.stored, to + s * full, scratch.grad_value + s * channels, channels);
        }
      }
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
static void softmax_backward(const Problem<T>& problem, T* scratch, int64_t row_begin, int64_t row_end) {
  const int32_t count = problem.levels * problem.points;
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* grad = problem.grad_weights + r * count;
    T sum = T(0);
    for (int32_t k = 0; k < count; ++k) scratch[k] = problem.weights[r * count + k];
    softmax(scratch, count, (count + Simd<T>::lanes - 1) / Simd<T>::lanes * Simd<T>::lanes);
    for (int32_t k = 0; k < count; ++k) sum += scratch[k] * grad[k];
    for (int32_t k = 0; k < count; ++k) grad[k] = softmax_gradient(scratch[k], grad[k], sum);
  }
}

template <typename T>
static Kernels<T> kernels(int32_t channels) {
  if constexpr (sizeof(T) == sizeof(float)) {  // float64 is for checks rather than for speed
    switch (channels) {
      case 16: return {forward_of<T, 16>, backward_of<T, 16>, softmax_backward<T>};
      case 32: return {forward_of<T, 32>, backward_of<T, 32>, softmax_backward<T>};
      case 64: return {forward_of<T, 64>, backward_of<T, 64>, softmax_backward<T>};
      default: break;
    }
  }
  return {forward_of<T, 0>, backward_of<T, 0>, softmax_backward<T>};
}
