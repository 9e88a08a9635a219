// Which of the CPU kernels' instruction sets this machine takes.
#pragma once

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DETR_X86 1
#endif

namespace detr_family {

enum class Instructions { generic, avx2, avx512 };

inline Instructions instructions() {
  static const Instructions chosen = [] {
#if defined(DETR_X86)
    const char* wanted = std::getenv("DETR_FAMILY_CPU_INSTRUCTIONS");  // to test what this machine would not take
    const std::string most = wanted == nullptr ? "avx512" : wanted;
    const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has512 = has2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (has512 && most == "avx512") return Instructions::avx512;
    if (has2 && most != "generic") return Instructions::avx2;
#endif
    return Instructions::generic;
  }();
  return chosen;
}

}  // namespace detr_family
