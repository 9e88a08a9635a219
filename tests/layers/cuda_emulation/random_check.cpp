// Random configurations, through cuda.cu's own entry points, against float64: random_check SECONDS SEED [NUMBER] [FAULT]
// SECONDS are the processor's.
//
// Operands may lie at addresses that are no multiple of 16, points anywhere (some nowhere: NaN, infinity, 1e30), exactly
// on the pixels' centres or off them, gradients may be infinite. Ends with 1 where something differs; a message of the
// emulation or of a sanitizer ends it at once.
#include <cmath>
#include <ctime>
#include <limits>
#include <string>

#include "cuda.cpp"  // cuda.cu, translated

using namespace detr_family;

namespace {
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();

struct Random {
  uint64_t state;
  uint64_t next() {
    state += 0x9e3779b97f4a7c15ull;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull, z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int below(int n) { return int(next() % uint64_t(n)); }
  bool one_in(int n) { return below(n) == 0; }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
  template <typename... T>
  int pick(T... t) {
    const int all[] = {t...};
    return all[below(sizeof...(t))];
  }
};

double read(const void* data, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::Double: return static_cast<const double*>(data)[i];
    case ScalarType::Half: return __half2float(static_cast<const __half*>(data)[i]);
    case ScalarType::BFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case ScalarType::Long: return double(static_cast<const int64_t*>(data)[i]);
    case ScalarType::Int: return static_cast<const int32_t*>(data)[i];
    default: return static_cast<const float*>(data)[i];
  }
}

void write(void* data, ScalarType type, int64_t i, double x) {
  switch (type) {
    case ScalarType::Double: static_cast<double*>(data)[i] = x; break;
    case ScalarType::Half: static_cast<__half*>(data)[i] = __half(float(x)); break;
    case ScalarType::BFloat16: static_cast<__nv_bfloat16*>(data)[i] = __nv_bfloat16(float(x)); break;
    case ScalarType::Long: static_cast<int64_t*>(data)[i] = int64_t(x); break;
    case ScalarType::Int: static_cast<int32_t*>(data)[i] = int32_t(x); break;
    default: static_cast<float*>(data)[i] = float(x);
  }
}

double read(const Tensor& tensor, int64_t i) { return read(tensor.data_ptr(), tensor.scalar_type(), i); }
void write(const Tensor& tensor, int64_t i, double x) { write(tensor.data_ptr(), tensor.scalar_type(), i, x); }

using Numbers = std::vector<double>;

Numbers all_of(const Tensor& tensor) {
  Numbers numbers(size_t(tensor.numel()));
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = read(tensor, int64_t(i));
  return numbers;
}

template <typename Make>
Numbers fill(const Tensor& tensor, Make make) {
  for (int64_t i = 0; i < tensor.numel(); ++i) write(tensor, i, make(i));
  return all_of(tensor);
}

struct Case {
  int batch, queries, heads, channels, levels, points, reference_dims, tokens;
  std::vector<int> height, width, start;
  bool fused, deterministic, wild, knots, not_finite, crowded;
  unsigned variants;
  ScalarType value, numbers;
  std::string text;
  int64_t bad_row = -1;  // of (b, q, m): the one with a gradient that is not finite
};

struct Expected {
  Numbers numbers[4];        // output, and the gradients of value, numbers and weights
  double softmax_scale = 0;  // the size of what the softmax's last step is a difference of
};

Expected compute(const Case& c, const Numbers& value, const Numbers& anchors, const Numbers& numbers,
                 const Numbers& weights, const Numbers& grad) {
  const size_t B = c.batch, Q = c.queries, M = c.heads, D = c.channels, LP = size_t(c.levels) * c.points, S = c.tokens;
  Expected e;
  e.numbers[0].assign(B * Q * M * D, 0), e.numbers[1].assign(B * S * M * D, 0);
  e.numbers[2].assign(B * Q * M * LP * 2, 0), e.numbers[3].assign(B * Q * M * LP, 0);
  Numbers attention(LP), d_attention(LP);
  for (size_t row = 0; row < B * Q * M; ++row) {
    const size_t b = row / (Q * M), q = row / M % Q, m = row % M;
    double largest = -kInfinity, sum = 0;
    for (size_t k = 0; k < LP; ++k) largest = std::max(largest, weights[row * LP + k]);
    for (size_t k = 0; k < LP; ++k) sum += attention[k] = std::exp(weights[row * LP + k] - largest);
    for (size_t k = 0; k < LP; ++k) attention[k] = c.fused ? attention[k] / sum : weights[row * LP + k];
    for (size_t k = 0; k < LP; ++k) {
      const size_t l = k / c.points;
      const int size[2] = {c.width[l], c.height[l]};
      const double* anchor = c.fused ? &anchors[((b * Q + q) * c.levels + l) * c.reference_dims] : nullptr;
      double x[2], scale[2];
      for (int a = 0; a < 2; ++a) {
        scale[a] = !c.fused ? size[a] : c.reference_dims == 2 ? 1 : anchor[2 + a] * size[a] * 0.5 / c.points;
        x[a] = numbers[(row * LP + k) * 2 + a] * scale[a] + (c.fused ? anchor[a] * size[a] : 0) - 0.5;
      }
      double d_x = 0, d_y = 0, d_a = 0;
      if (x[0] >= -1 && x[0] < size[0] && x[1] >= -1 && x[1] < size[1]) {
        const int x0 = int(std::floor(x[0])), y0 = int(std::floor(x[1]));
        for (int corner = 0; corner < 4; ++corner) {
          const int dx = corner & 1, dy = corner >> 1, cx = x0 + dx, cy = y0 + dy;
          if (cx < 0 || cy < 0 || cx >= size[0] || cy >= size[1]) continue;
          const double wx = dx ? x[0] - x0 : 1 - (x[0] - x0), wy = dy ? x[1] - y0 : 1 - (x[1] - y0);
          const size_t at = ((b * S + c.start[l] + size_t(cy) * size[0] + cx) * M + m) * D;
          double dot = 0;
          for (size_t d = 0; d < D; ++d) {
            const double g = grad[row * D + d];
            e.numbers[0][row * D + d] += attention[k] * wx * wy * value[at + d];
            e.numbers[1][at + d] += attention[k] * wx * wy * g;
            dot += g * value[at + d];
          }
          d_a += wx * wy * dot, d_x += (dx ? 1 : -1) * wy * dot, d_y += (dy ? 1 : -1) * wx * dot;
        }
      }
      e.numbers[2][(row * LP + k) * 2] = attention[k] * scale[0] * d_x;
      e.numbers[2][(row * LP + k) * 2 + 1] = attention[k] * scale[1] * d_y;
      d_attention[k] = d_a;
    }
    double all = 0;
    for (size_t k = 0; k < LP; ++k) {
      all += attention[k] * d_attention[k];
      e.softmax_scale = std::fmax(e.softmax_scale, std::fabs(attention[k] * d_attention[k]));
    }
    for (size_t k = 0; k < LP; ++k)
      e.numbers[3][row * LP + k] = c.fused ? attention[k] * (d_attention[k] - all) : d_attention[k];
  }
  return e;
}

long comparisons = 0, mismatches = 0;

void compare(const Case& c, const Expected& e, int what, const Tensor& result, double tolerance) {
  static const char* const names[] = {"output", "grad_value", "grad_numbers", "grad_weights"};
  const Numbers &expected = e.numbers[what], got = all_of(result);
  double scale = what == 3 && c.fused && std::isfinite(e.softmax_scale) ? std::max(e.softmax_scale, 1e-3) : 1e-3;
  for (double x : expected)
    if (std::isfinite(x)) scale = std::max(scale, std::fabs(x));
  ++comparisons;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isfinite(expected[i]) && !std::isfinite(got[i])) continue;
    // infinity times the zero that stands for a pixel outside: NaN, where the formula skips it
    if (what >= 2 && int64_t(i) / (int64_t(c.levels) * c.points * (what == 2 ? 2 : 1)) == c.bad_row) continue;
    if (std::fabs(expected[i] - got[i]) / scale <= tolerance) continue;
    ++mismatches;
    std::printf("MISMATCH in %s, number %zu of %zu: expected %.9g, got %.9g (scale %.3g): %s\n", names[what], i,
                expected.size(), expected[i], got[i], scale, c.text.c_str());
    return;
  }
}

void run(Case& c, Random& random) {
  const int64_t B = c.batch, Q = c.queries, M = c.heads, D = c.channels, L = c.levels, P = c.points, S = c.tokens;
  const bool wide = c.value == ScalarType::Double;
  const ScalarType sums = wide ? ScalarType::Double : ScalarType::Float;
  const auto skip = [&] { return size_t(random.pick(0, 0, 1, 3)); };
  const Tensor value({B, S, M, D}, c.value, skip()), grad({B, Q, M * D}, c.value, skip());
  const Tensor numbers({B, Q, M, L, P, 2}, c.numbers, skip()), weights({B, Q, M, L, P}, c.numbers, skip());
  const Tensor shapes({L, 2}, ScalarType::Long), starts({L}, ScalarType::Long);
  std::optional<Tensor> anchors;
  Numbers anchor_numbers;
  const double span = random.pick(1, 1, 30, 1000) * 0.1;
  const Numbers value_numbers = fill(value, [&](int64_t) { return random.normal(); });
  Numbers grad_numbers = fill(grad, [&](int64_t) { return random.normal() * span; });
  if (c.not_finite) {
    const int64_t at = random.below(int(grad.numel()));
    c.bad_row = at / D;
    write(grad, at, random.one_in(2) ? kInfinity : kNaN);
    grad_numbers = all_of(grad);
  }
  const Numbers weight_numbers = fill(weights, [&](int64_t) { return random.normal() * (c.fused ? 3 : 1); });
  if (c.fused) {
    anchors = Tensor({B, Q, L, c.reference_dims}, sums, skip());
    anchor_numbers = fill(*anchors, [&](int64_t i) {
      if (c.knots) return 0.5;
      return i % c.reference_dims < 2 ? 0.1 + 0.8 * random.uniform() : 0.1 + random.uniform();
    });
  }
  const double wild[] = {kNaN, kInfinity, -kInfinity, 1e30, -1e30, 3e9, -3e9, 2147483648.0, -2147483648.0, 65504, -70, 1e-40};
  const auto along = [&](int64_t i, double& scale, double& base) {  // pixel = number * scale + base
    const int64_t a = i % 2, l = i / 2 % (L * P) / P, at = (i / (2 * L * P * M) * L + l) * c.reference_dims;
    const int size = a ? c.height[size_t(l)] : c.width[size_t(l)];
    scale = !c.fused ? size : c.reference_dims == 2 ? 1 : anchor_numbers[size_t(at + 2 + a)] * size * 0.5 / c.points;
    base = (c.fused ? anchor_numbers[size_t(at + a)] * size : 0) - 0.5;
    return size;
  };
  Numbers point_numbers = fill(numbers, [&](int64_t i) {
    if (c.wild && random.one_in(4)) return wild[random.below(12)];
    double scale, base;
    const int size = along(i, scale, base);
    const double where = c.crowded ? random.uniform() : random.uniform() * 1.5 - 0.25;
    double pixel = std::floor(where * size) + (c.knots ? 0 : 0.1 + 0.8 * random.uniform());
    if (!c.crowded && random.one_in(16)) pixel += random.pick(-5, -2, 2, 7) * size;
    return (pixel - base) / scale;
  });
  if (c.numbers == ScalarType::Half || c.numbers == ScalarType::BFloat16) {
    for (int64_t i = 0; i < numbers.numel(); ++i) {  // rounding may have brought a point onto a knot: off with it
      double scale, base;
      along(i, scale, base);
      const double x = point_numbers[size_t(i)] * scale + base;
      if (!c.knots && std::isfinite(x) && std::fabs(x - std::round(x)) < 1e-3 * std::max(1.0, std::fabs(scale)))
        write(numbers, i, -50000.0);
    }
    point_numbers = all_of(numbers);
  }
  for (int64_t l = 0; l < L; ++l) {
    write(shapes, 2 * l, c.height[size_t(l)]), write(shapes, 2 * l + 1, c.width[size_t(l)]);
    write(starts, l, c.start[size_t(l)]);
  }
  const Expected e = compute(c, value_numbers, anchor_numbers, point_numbers, weight_numbers, grad_numbers);
  detr_family_cuda_variants(c.variants);
  const Tensor output = forward(value, shapes, starts, anchors, numbers, weights);
  const auto grads = backward(grad, value, shapes, starts, anchors, numbers, weights, c.deterministic);
  // A float coordinate that is off by one part in 2^24 of the number of pixels moves a weight by as much.
  double size = 1;
  for (size_t l = 0; l < size_t(L); ++l) size = std::max<double>(size, std::max(c.height[l], c.width[l]));
  const double slack = wide ? 2e-12 : 4e-6 + 3e-7 * size;
  const double of_value = value.element_size() == 2 ? 5e-3 : slack, of_numbers = numbers.element_size() == 2 ? 5e-3 : slack;
  compare(c, e, 0, output, of_value + slack);
  compare(c, e, 1, std::get<0>(grads), of_value + slack);
  if (!c.knots || !c.fused) compare(c, e, 2, std::get<1>(grads), of_numbers + slack);
  compare(c, e, 3, std::get<2>(grads), of_numbers + slack);
}

Case make_case(Random& random, const std::string& name) {
  Case c;
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};
  c.value = types[random.pick(0, 0, 0, 1, 1, 2, 3)];
  const bool narrow = c.value == ScalarType::BFloat16 || c.value == ScalarType::Half;
  c.batch = random.pick(1, 1, 2, 3), c.heads = random.pick(1, 2, 3, 5, 8, 8, 16);
  c.channels = random.pick(32, 32, 32, 32, 32, 8, 16, 48, 64, 128, 1, 5, 33);
  c.levels = random.pick(1, 2, 3, 4, 4, 5), c.points = random.pick(1, 2, 3, 4, 4, 5, 7, 8);
  c.fused = random.one_in(2), c.deterministic = random.one_in(3), c.wild = random.one_in(4), c.knots = random.one_in(8);
  c.not_finite = !c.knots && random.one_in(8);  // infinity times a weight that rounding makes zero, or not
  c.numbers = narrow && c.fused && !random.one_in(4) ? c.value : c.value == ScalarType::Double ? c.value : ScalarType::Float;
  c.reference_dims = random.pick(2, 4);
  c.variants = unsigned(random.pick(0, 1, 2, 3));
  // more tokens than a block's table has slots, all queries read anywhere: contributions that find no slot
  c.crowded = (c.variants & kCombine) && !c.knots && random.one_in(4);
  if (c.crowded) c.channels = 32, c.batch = 1, c.heads = 1, c.levels = 2, c.points = 8, c.deterministic = false;
  if (c.crowded && c.value == ScalarType::Double) c.value = c.numbers = ScalarType::Float;
  c.tokens = 0;
  for (int l = 0; l < c.levels; ++l) {
    // powers of two make pixels' centres exact, for the knots
    c.height.push_back(c.knots ? random.pick(1, 2, 4, 8, 16) : random.pick(1, 1, 2, 3, 7, 8, 9, 13, 17, 25));
    c.width.push_back(c.knots ? random.pick(1, 2, 4, 8, 16) : random.pick(1, 2, 3, 5, 8, 11, 16, 19, 31));
    if (c.crowded) c.height.back() = random.pick(29, 32, 41), c.width.back() = random.pick(26, 32, 37);
    c.start.push_back(c.tokens);
    c.tokens += c.height.back() * c.width.back();
  }
  c.queries = c.crowded || random.one_in(2) ? c.tokens : random.pick(1, 2, 7, 31, 33, 63, 65, 100, 130);
  // shuffles take the time: 640 switches of threads per point in the general kernel's backward, some 28 in the others
  const auto cost = [&] {
    const bool general = c.value == ScalarType::Double || c.channels != 32;
    return double(c.batch) * c.queries * c.heads * c.levels * c.points * (general ? 640 * ((c.channels + 31) / 32) : 28);
  };
  while (cost() > 2e6 && c.heads > 1) c.heads = (c.heads + 1) / 2;
  while (cost() > 2e6 && c.batch > 1) --c.batch;
  while (cost() > 4e6 && c.queries > 40) c.queries = c.queries / 2 + 1;
  emu::most_blocks = random.pick(65535, 65535, 1, 2, 3);
  const char* const type_names[] = {"float", "double", "half", "bfloat16"};
  c.text = name + ": " + type_names[int(c.value)] + " and " + type_names[int(c.numbers)];
  const std::pair<const char*, int> parts[] = {
      {"B", c.batch}, {"Q", c.queries}, {"M", c.heads}, {"D", c.channels}, {"L", c.levels}, {"P", c.points},
      {"fused", c.fused}, {"dims", c.reference_dims}, {"deterministic", c.deterministic}, {"wild", c.wild},
      {"knots", c.knots}, {"not finite", c.not_finite}, {"crowded", c.crowded}, {"variants", int(c.variants)}, {"grid.y", int(emu::most_blocks)}};
  for (const auto& [key, number] : parts) c.text += std::string(" ") + key + "=" + std::to_string(number);
  for (int l = 0; l < c.levels; ++l)
    c.text += " " + std::to_string(c.height[size_t(l)]) + "x" + std::to_string(c.width[size_t(l)]);
  return c;
}
}  // namespace

void emu::convert(const void* from, ScalarType of, void* to, ScalarType type, int64_t count) {
  for (int64_t i = 0; i < count; ++i) write(to, type, i, read(from, of, i));
}

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 60;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 0) : 1;
  const long only = argc > 3 ? std::atol(argv[3]) : -1;
  emu::fault = argc > 4 ? std::atoi(argv[4]) : 0;
  long number = std::max(only, 0l);
  for (;; ++number) {
    if (only >= 0 && number > only) break;
    if (double(std::clock()) / CLOCKS_PER_SEC > seconds) break;  // of the processor: a busy machine checks as many
    Random random{seed * 1000003 + uint64_t(number)};
    emu::seed = random.next() | 1;
    Case c = make_case(random, "number " + std::to_string(number) + " of seed " + std::to_string(seed));
    if (only >= 0 || std::getenv("VERBOSE")) std::fprintf(stderr, "%s\n", c.text.c_str());
    run(c, random);
    if (mismatches && emu::fault) break;
  }
  std::printf("%ld configurations, %ld comparisons, %ld mismatches\n", number, comparisons, mismatches);
  return mismatches != 0;
}
