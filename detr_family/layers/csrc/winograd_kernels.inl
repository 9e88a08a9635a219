// The kernels of Winograd's convolutions, F(4x4, 3x3) of arXiv 1509.09308, in terms of vectors; see
// every_instruction_set.inl. A vector holds as many channels of one place.

#include "vectors.inl"

static constexpr int kLanes = Simd<float>::lanes;

// The tiles' polynomials are taken at 0, +-kNear, +-kFar and infinity, all powers exact in float32. The paper has 1 and 2
// there (section 4.3), whose transforms lose twice as much to rounding.
static constexpr float kNear = 5.0f / 8, kNear2 = kNear * kNear, kNear3 = kNear2 * kNear;
static constexpr float kFar = 3.0f / 2, kFar2 = kFar * kFar, kFar3 = kFar2 * kFar;
static constexpr float kOfZero = 1 / (kNear2 * kFar2);                   // what filters are divided by at each point
static constexpr float kOfNear = 1 / (2 * kNear2 * (kNear2 - kFar2));
static constexpr float kOfFar = 1 / (2 * kFar2 * (kFar2 - kNear2));

// Six numbers along a row or a column of a tile to six: input.
static DETR_INLINE void transform_input(const Floats* d, Floats* v) {
  const Floats near_even = d[4] - kFar2 * d[2], near_odd = kNear * (d[3] - kFar2 * d[1]);
  const Floats far_even = d[4] - kNear2 * d[2], far_odd = kFar * (d[3] - kNear2 * d[1]);
  v[0] = kNear2 * kFar2 * d[0] - (kNear2 + kFar2) * d[2] + d[4];
  v[1] = near_even + near_odd;
  v[2] = near_even - near_odd;
  v[3] = far_even + far_odd;
  v[4] = far_even - far_odd;
  v[5] = kNear2 * kFar2 * d[1] - (kNear2 + kFar2) * d[3] + d[5];
}

// Six to four: the inverse transform.
static DETR_INLINE void transform_result(const Floats* m, Floats* y) {
  const Floats near_even = m[1] + m[2], near_odd = m[1] - m[2];
  const Floats far_even = m[3] + m[4], far_odd = m[3] - m[4];
  y[0] = m[0] + near_even + far_even;
  y[1] = kNear * near_odd + kFar * far_odd;
  y[2] = kNear2 * near_even + kFar2 * far_even;
  y[3] = kNear3 * near_odd + kFar3 * far_odd + m[5];
}

// Four to six: the inverse transform's transpose, for gradients.
static DETR_INLINE void transform_gradient(const Floats* g, Floats* s) {
  const Floats near_even = g[0] + kNear2 * g[2], near_odd = kNear * g[1] + kNear3 * g[3];
  const Floats far_even = g[0] + kFar2 * g[2], far_odd = kFar * g[1] + kFar3 * g[3];
  s[0] = g[0];
  s[1] = near_even + near_odd;
  s[2] = near_even - near_odd;
  s[3] = far_even + far_odd;
  s[4] = far_even - far_odd;
  s[5] = g[3];
}

// Three to six: the filter.
static DETR_INLINE void transform_filter(const Floats* w, Floats* u) {
  const Floats near_even = w[0] + kNear2 * w[2], near_odd = kNear * w[1];
  const Floats far_even = w[0] + kFar2 * w[2], far_odd = kFar * w[1];
  u[0] = kOfZero * w[0];
  u[1] = kOfNear * (near_even + near_odd);
  u[2] = kOfNear * (near_even - near_odd);
  u[3] = kOfFar * (far_even + far_odd);
  u[4] = kOfFar * (far_even - far_odd);
  u[5] = w[2];
}

// Six to three: its transpose.
static DETR_INLINE void transform_filter_gradient(const Floats* u, Floats* w) {
  const Floats near_even = kOfNear * (u[1] + u[2]), near_odd = kOfNear * (u[1] - u[2]);
  const Floats far_even = kOfFar * (u[3] + u[4]), far_odd = kOfFar * (u[3] - u[4]);
  w[0] = kOfZero * u[0] + near_even + far_even;
  w[1] = kNear * near_odd + kFar * far_odd;
  w[2] = kNear2 * near_even + kFar2 * far_even + u[5];
}

// Both ways: m x m numbers to n x n, with a transform of m to n.
template <int m, int n, void (*transform)(const Floats*, Floats*)>
static DETR_INLINE void both_ways(const Floats (&from)[m][m], Floats (&to)[n][n]) {
  Floats half[m][n];  // rows of from, transformed
  for (int i = 0; i < m; ++i) transform(from[i], half[i]);
  for (int j = 0; j < n; ++j) {
    Floats column[m], done[n];
    for (int i = 0; i < m; ++i) column[i] = half[i][j];
    transform(column, done);
    for (int i = 0; i < n; ++i) to[i][j] = done[i];
  }
}

// A vector's numbers from a place on, of one array or the other.
static DETR_INLINE Floats load(Stored stored, const float* numbers, const uint16_t* halves, int64_t place) {
  if (stored == Stored::same) return at(numbers + place);
  return widen(stored, *reinterpret_cast<const UnalignedHalves*>(halves + place));
}

// n x n places of a map from (top, left) on, channels from c on; zeros outside.
template <int n, bool inside>
static DETR_INLINE void read(const Map& map, int64_t image, int64_t top, int64_t left, int32_t c, Floats (&to)[n][n]) {
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      const int64_t y = top + i, x = left + j;
      if (!inside && (y < 0 || y >= map.height || x < 0 || x >= map.width)) {
        to[i][j] = Floats{};
        continue;
      }
      const int64_t place = ((image * map.height + y) * map.width + x) * map.channels + c;
      to[i][j] = load(map.stored, map.numbers, map.narrow, place);
    }
  }
}

struct Tile {
  int64_t image, y, x;  // of its 4x4 results
};

static DETR_INLINE Tile tile_of(const Map& map, int64_t number) {
  const int64_t image = number / (map.down * map.right), rest = number % (map.down * map.right);
  return {image, rest / map.right * 4, rest % map.right * 4};
}

static void inputs(const Map& map, int64_t first, int64_t last, float* transformed, int64_t stride) {
  for (int64_t t = first; t < last; ++t) {
    const Tile tile = tile_of(map, t);
    const int64_t top = tile.y - 1, left = tile.x - 1;
    const bool inside = top >= 0 && left >= 0 && top + 6 <= map.height && left + 6 <= map.width;
    float* to = transformed + (t - first) * map.channels;
    for (int32_t c = 0; c < map.channels; c += kLanes) {
      Floats tile6[6][6], done[6][6];
      if (inside)
        read<6, true>(map, tile.image, top, left, c, tile6);
      else
        read<6, false>(map, tile.image, top, left, c, tile6);
      both_ways<6, 6, transform_input>(tile6, done);
      for (int p = 0; p < kPositions; ++p) at(to + p * stride + c) = done[p / 6][p % 6];
    }
  }
}

static void gradients(const Map& map, int64_t first, int64_t last, float* transformed, int64_t stride, int64_t count) {
  for (int64_t t = first; t < last; ++t) {
    const Tile tile = tile_of(map, t);
    const bool inside = tile.y + 4 <= map.height && tile.x + 4 <= map.width;
    for (int32_t c = 0; c < map.channels; c += kLanes) {
      Floats tile4[4][4], done[6][6];
      if (inside)
        read<4, true>(map, tile.image, tile.y, tile.x, c, tile4);
      else
        read<4, false>(map, tile.image, tile.y, tile.x, c, tile4);
      both_ways<4, 6, transform_gradient>(tile4, done);
      float* to = transformed + (c / kPanel * count + t - first) * kPanel + c % kPanel;
      for (int p = 0; p < kPositions; ++p) at(to + p * stride) = done[p / 6][p % 6];
    }
  }
}

static void results(const Map& map, const Result& result, int64_t first, int64_t last, const float* products,
                    int64_t stride) {
  for (int64_t t = first; t < last; ++t) {
    const Tile tile = tile_of(map, t);
    const float* from = products + (t - first) * result.channels;
    const int rows = int(tile.y + 4 <= map.height ? 4 : map.height - tile.y);
    const int columns = int(tile.x + 4 <= map.width ? 4 : map.width - tile.x);
    for (int32_t c = 0; c < result.channels; c += kLanes) {
      Floats sums[6][6], done[4][4];
      for (int p = 0; p < kPositions; ++p) sums[p / 6][p % 6] = at(from + p * stride + c);
      both_ways<6, 4, transform_result>(sums, done);
      const Floats bias = result.bias == nullptr ? Floats{} : Floats(at(result.bias + c));
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < columns; ++j) {
          const int64_t place =
              ((tile.image * map.height + tile.y + i) * map.width + tile.x + j) * result.channels + c;
          Floats y = done[i][j] + bias;
          if (result.add) y += load(result.stored, result.numbers, result.narrow, place);
          if (result.relu) y = choose((Ints)(y < 0.0f), Floats{}, y);
          if (result.stored == Stored::same)
            at(result.numbers + place) = y;
          else
            *reinterpret_cast<UnalignedHalves*>(result.narrow + place) = narrow(result.stored, y);
        }
      }
    }
  }
}

static void filters(const float* weight, int32_t out, int32_t in, bool backwards, float* transformed, int32_t first,
                    int32_t last) {
  const int32_t deep = backwards ? out : in, wide = backwards ? in : out;  // what is summed over; results
  const int64_t stride = int64_t(wide) * deep;
  for (int32_t panel = first; panel < last; ++panel) {
    for (int32_t k = 0; k < deep; ++k) {
      float* to = transformed + (int64_t(panel) * deep + k) * kPanel;
      for (int32_t lane = 0; lane < kPanel; lane += kLanes) {
        Floats filter[3][3], done[6][6];
        for (int i = 0; i < kLanes; ++i) {
          const int32_t n = panel * kPanel + lane + i;
          const float* from = weight + (backwards ? int64_t(k) * in + n : int64_t(n) * in + k) * 9;
          for (int q = 0; q < 9; ++q) filter[q / 3][q % 3][i] = from[backwards ? 8 - q : q];
        }
        both_ways<3, 6, transform_filter>(filter, done);
        for (int p = 0; p < kPositions; ++p) at(to + p * stride + lane) = done[p / 6][p % 6];
      }
    }
  }
}

static void filter_gradients(const float* transformed, int32_t out, int32_t in, float* weight, int32_t first,
                             int32_t last) {
  const int64_t stride = int64_t(in) * out;
  for (int32_t k = first; k < last; ++k) {
    for (int32_t n = 0; n < out; n += kLanes) {
      Floats sums[6][6], done[3][3];
      for (int p = 0; p < kPositions; ++p) sums[p / 6][p % 6] = at(transformed + p * stride + int64_t(k) * out + n);
      both_ways<6, 3, transform_filter_gradient>(sums, done);
      for (int i = 0; i < kLanes; ++i)
        for (int q = 0; q < 9; ++q) weight[(int64_t(n + i) * in + k) * 9 + q] = done[q / 3][q % 3][i];
    }
  }
}

// kRows x kLanes * vectors sums at a time stay in registers.
template <int rows, int vectors>
static DETR_INLINE void multiply_block(const float* __restrict a, int64_t a_row, int64_t a_column,
                                       const float* __restrict b, float* __restrict c, int64_t c_row, int64_t count,
                                       bool add) {
  Floats sums[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) sums[i][j] = add ? Floats(at(c + i * c_row + j * kLanes)) : Floats{};
  for (int64_t k = 0; k < count; ++k) {
    Floats right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = at(b + j * kLanes);
    for (int i = 0; i < rows; ++i) {
      const Floats left = a[i * a_row] - Floats{};  // minus, for x - 0 is x and is left out; 0 + x may not be
      for (int j = 0; j < vectors; ++j) sums[i][j] += left * right[j];
    }
    a += a_column;
    b += kPanel;
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) at(c + i * c_row + j * kLanes) = sums[i][j];
}

static void multiply(const float* a, int64_t a_row, int64_t a_column, const float* b, float* c, int64_t c_row,
                     int64_t m, int64_t n, int64_t k, bool add) {
  constexpr int rows = VECTOR_BYTES == 64 ? 8 : 4;  // as many as there are registers for
  for (int64_t panel = 0; panel < n; panel += kPanel) {
    for (int64_t row = 0; row < m; row += rows) {
      for (int32_t lane = 0; lane < kPanel; lane += 2 * kLanes)
        multiply_block<rows, 2>(a + row * a_row, a_row, a_column, b + panel * k + lane, c + row * c_row + panel + lane,
                                c_row, k, add);
    }
  }
}

static WinogradKernels winograd_kernels() {
  return {filters, inputs, gradients, results, multiply, filter_gradients};
}
