// The kernels of a chunk for x86-64 with AVX2.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <type_traits>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTCLIP_ISA avx2
#define FASTCLIP_VECTOR_BYTES 32
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
