// Vectors of VECTOR_BYTES bytes for the CPU kernels, and rows of numbers of 16 bits. Included by each set of kernels, once
// per instruction set (every_instruction_set.inl).

template <typename T>
struct LaneInteger;
template <>
struct LaneInteger<float> {
  using type = int32_t;
};
template <>
struct LaneInteger<double> {
  using type = int64_t;
};

template <typename T>
struct Simd {
  static constexpr int lanes = VECTOR_BYTES / sizeof(T);
  using Integer = typename LaneInteger<std::remove_const_t<T>>::type;
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef Integer Integers __attribute__((vector_size(VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

using Floats = Simd<float>::Vector;
using Doubles = Simd<double>::Vector;
using Ints = Simd<float>::Integers;
using Longs = Simd<double>::Integers;

static DETR_INLINE Ints to_integer(Floats x) { return __builtin_convertvector(x, Ints); }
static DETR_INLINE Longs to_integer(Doubles x) { return __builtin_convertvector(x, Longs); }
static DETR_INLINE void to_number(Ints i, Floats& x) { x = __builtin_convertvector(i, Floats); }
static DETR_INLINE void to_number(Longs i, Doubles& x) { x = __builtin_convertvector(i, Doubles); }
static DETR_INLINE Floats choose(Ints condition, Floats a, Floats b) { return condition ? a : b; }
static DETR_INLINE Doubles choose(Longs condition, Doubles a, Doubles b) { return condition ? a : b; }
static DETR_INLINE Ints choose(Ints condition, Ints a, Ints b) { return condition ? a : b; }
static DETR_INLINE Longs choose(Longs condition, Longs a, Longs b) { return condition ? a : b; }

// Vectors in memory, aligned like a single number.
template <typename T>
static DETR_INLINE typename Simd<T>::Unaligned& at(T* pointer) {
  return *reinterpret_cast<typename Simd<T>::Unaligned*>(pointer);
}

template <typename T>
static DETR_INLINE const typename Simd<T>::Unaligned& at(const T* pointer) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(pointer);
}

// Numbers of 16 bits, a vector's worth of them, from and to floats; to nearest even, as torch does.
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

static DETR_INLINE Floats widen(Stored stored, Halves narrow) {
  const Bits h = __builtin_convertvector(narrow, Bits);
  if (stored == Stored::bfloat16) return (Floats)(h << 16);
  const Bits size = h & 0x7fff, sign = (h & 0x8000) << 16;
  const Bits finite = (Bits)((Floats)(size << 13) * 5.192296858534828e+33f);  // 2^112, subnormal numbers too
  const Bits outside = (size << 13) | 0x7f800000;                            // infinities and NaN
  return (Floats)((Bits)choose((Ints)(size >= 0x7c00), (Ints)outside, (Ints)finite) | sign);
}

static DETR_INLINE Halves narrow(Stored stored, Floats x) {
  const Bits bits = (Bits)x;
  if (stored == Stored::bfloat16) {
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((Bits)choose((Ints)(x != x), (Ints)(Bits{} + 0x7fc0), (Ints)rounded), Halves);
  }
  const Bits size = bits & 0x7fffffff;
  const Bits normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const Bits small = (Bits)((Floats)size + 0.5f) - (126u << 23);  // the addition rounds where the last bit shall be
  const Bits large = (Bits)choose((Ints)(x != x), (Ints)(Bits{} + 0x7e00), (Ints)(Bits{} + 0x7c00));
  Ints result = choose((Ints)(size < (113u << 23)), (Ints)small, (Ints)normal);
  result = choose((Ints)(size >= (143u << 23)), (Ints)large, result);
  return __builtin_convertvector((Bits)result | (bits >> 16 & 0x8000), Halves);
}

// A row of numbers of 16 bits to floats and back.
static DETR_INLINE void widen_row(Stored stored, float* __restrict to, const uint16_t* __restrict from, int32_t count) {
  constexpr int lanes = Simd<float>::lanes;
  int32_t d = 0;
  for (; d + lanes <= count; d += lanes)
    at(to + d) = widen(stored, *reinterpret_cast<const UnalignedHalves*>(from + d));
  if (d == count) return;
  Halves rest = {};
  for (int32_t i = 0; i < count - d; ++i) rest[i] = from[d + i];
  const Floats wide = widen(stored, rest);
  for (int32_t i = 0; i < count - d; ++i) to[d + i] = wide[i];
}

static DETR_INLINE void narrow_row(Stored stored, uint16_t* __restrict to, const float* __restrict from, int32_t count) {
  constexpr int lanes = Simd<float>::lanes;
  int32_t d = 0;
  for (; d + lanes <= count; d += lanes)
    *reinterpret_cast<UnalignedHalves*>(to + d) = narrow(stored, at(from + d));
  if (d == count) return;
  Floats rest = {};
  for (int32_t i = 0; i < count - d; ++i) rest[i] = from[d + i];
  const Halves small = narrow(stored, rest);
  for (int32_t i = 0; i < count - d; ++i) to[d + i] = small[i];
}
