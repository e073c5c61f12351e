// The chunk functions one instruction set offers; cpu.cpp picks a table at run time.
#pragma once

#include <cstdint>

#include "elementwise.h"

namespace fastclip {

enum class Dtype : int { F32, F64, BF16, F16 };

// One tensor's part of an optimizer step: n elements of each array, which start `first` elements into the tensor.
struct StepArrays {
  void *param, *state[3];  // AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq or null; SGD: momentum_buffer or null
  const void* grad;
  int64_t n, first;
  bool stochastic;       // bfloat16 results rounded by chance, with the random numbers of `key`
  uint32_t key;
};

struct DtypeKernels {
  using Measure = Moments (*)(const void* data, int64_t n, double p);
  Measure l2_sum, l2, l1, max, power;  // l2_sum leaves absmax 0; all others give power and absmax
  void (*scale)(void* data, int64_t n, double coef);
  bool (*clamp)(void* data, int64_t n, double low, double high);
  void (*adamw)(const StepArrays& arrays, const AdamW<double>& constants);
  void (*sgd)(const StepArrays& arrays, const Sgd<double>& constants, bool nesterov);
};

struct CpuKernels {
  DtypeKernels of[4];  // by Dtype
};

namespace portable { extern const CpuKernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const CpuKernels kernels; }
namespace avx512 { extern const CpuKernels kernels; }
#endif

}  // namespace fastclip
