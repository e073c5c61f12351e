// The CPU backend: measure, apply and clamp over a Group, chunk by chunk on all threads.
#pragma once

#include "cpu_kernels_table.h"
#include "pack.h"

namespace fastclip::cpu {

// The instruction set in use: "avx512", "avx2" or "portable". FASTCLIP_CPU_ISA asks for a lesser one.
const char* isa();

// From now on without other threads. OpenMP's do not survive fork(): a child that hands work to them waits for ever.
void work_alone();

// Power sums (and maxima, if asked for) per segment into `per_segment` (may be null), and of everything as the result.
Moments measure(const Group& group, double p, bool absmax, Moments* per_segment);

// Segment i times coef[i * stride], rounded to float32 unless the group is float64; see `touch` in elementwise.h for 0 and 1.
void apply_(const Group& group, const double* coef, int64_t stride);

// Every element limited to [low, high]; memory that needs no change is not written. True if any was.
bool clamp_(const Group& group, double low, double high);

// What an optimizer keeps beside the gradients of a group, segment by segment.
struct States {
  struct Segment { void *param, *state[3]; float* step; };
  std::vector<Segment> segments;
  const bool* idle = nullptr;  // leave segment i as it is where idle[i * idle_stride]; null: none
  int64_t idle_stride = 0;
  bool is_idle(size_t i) const { return idle && idle[i * idle_stride]; }
  bool maximize = false;
  bool zero_grad = false;   // afterwards
  bool stochastic = false;  // round bfloat16 by chance, with random numbers from `seed`, another one for each step
  uint32_t seed = 0;
};

// One step of torch.optim.AdamW (lr, betas, eps, weight decay; `step` counts) and of torch.optim.SGD, the gradient of
// segment i multiplied by coef[i * stride] first. Parameters and states have the gradients' dtype, size and layout.
struct AdamWOptions { double lr, beta1, beta2, eps, weight_decay; };
struct SgdOptions { double lr, momentum, rest, weight_decay; bool nesterov; };
void adamw_(const Group& group, const States& states, const AdamWOptions& options, const double* coef, int64_t stride);
void sgd_(const Group& group, const States& states, const SgdOptions& options, const double* coef, int64_t stride);

}  // namespace fastclip::cpu
