// Which instructions this CPU and its operating system have. By asking the CPU: the compilers' own test,
// __builtin_cpu_supports, needs a library that not every linker on Windows is given.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>

namespace fastclip::cpu {

struct Features {
  bool avx2;    // with FMA and F16C
  bool avx512;  // F, BW, VL and DQ, and what avx2 stands for
};

// Which registers the operating system keeps across its switches from one thread to another.
inline uint32_t registers_kept() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

inline Features features_here() {
  Features here = {false, false};
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return here;
  constexpr unsigned WITH_AVX = bit_FMA | bit_OSXSAVE | bit_AVX | bit_F16C;
  if ((c & WITH_AVX) != WITH_AVX) return here;
  const uint32_t kept = registers_kept();
  constexpr uint32_t YMM = 0x06, ZMM = 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return here;
  constexpr unsigned WITH_AVX512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  here.avx2 = (kept & YMM) == YMM && (b & bit_AVX2);
  here.avx512 = here.avx2 && (kept & ZMM) == ZMM && (b & WITH_AVX512) == WITH_AVX512;
  return here;
}

}  // namespace fastclip::cpu
#endif
