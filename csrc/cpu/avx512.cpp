// The kernels of a chunk for x86-64 with AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <type_traits>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define FASTCLIP_ISA avx512
#define FASTCLIP_VECTOR_BYTES 64
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
