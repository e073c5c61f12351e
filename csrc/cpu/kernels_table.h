// The functions over one chunk that an instruction set offers; launch.cpp selects a table at run time.
#pragma once

#include <cstdint>

#include "../elementwise.h"

namespace fastclip::cpu {

// A chunk of one tensor in an optimizer step: n elements of each array, from element `offset` of the tensor on.
struct StepArrays {
  void *param, *state[3];  // AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq or null; SGD: momentum_buffer or null
  const void* grad;
  int64_t n, offset;
  bool stochastic;  // bfloat16 results are stochastically rounded, with the random numbers of `key`
  uint32_t key;
};

struct DtypeKernels {
  using Measure = NormPartial (*)(const void* data, int64_t n, double p);
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

}  // namespace fastclip::cpu
