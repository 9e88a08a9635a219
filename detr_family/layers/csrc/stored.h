// How numbers lie in memory that the CPU kernels compute with.
#pragma once

namespace detr_family {

// As what is computed with, or in 16 bits.
enum class Stored { same, bfloat16, half };

}  // namespace detr_family
