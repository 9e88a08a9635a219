// Includes the file DETR_KERNELS once for each instruction set, within a namespace of its own and under that set's target.
// Nothing of the standard library is included from there, lest a function of it be compiled for instructions that a
// machine lacks. instructions.h says which of them to take.

#if defined(__GNUC__)
#define DETR_INLINE inline __attribute__((always_inline))
#else
#define DETR_INLINE inline
#endif

namespace detr_family {

#define VECTOR_BYTES 16
namespace generic {
#include DETR_KERNELS
}
#undef VECTOR_BYTES

#if defined(DETR_X86)
#define VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include DETR_KERNELS
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef VECTOR_BYTES

#define VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#include DETR_KERNELS
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef VECTOR_BYTES
#endif

}  // namespace detr_family
