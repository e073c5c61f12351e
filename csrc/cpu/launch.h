// The interface of the CPU backend: measure, apply and clamp over a table of gradients, and the optimizers' steps, chunk by
// chunk on all threads. Plain structs and C functions; nothing in this folder knows torch or Python.
#pragma once

#include <cstdint>

#include "../elementwise.h"

// What a library of this folder exports; everything else is hidden where it is built for itself (CMakeLists.txt).
#ifdef _WIN32
#define FASTCLIP_API __declspec(dllexport)
#else
#define FASTCLIP_API __attribute__((visibility("default")))
#endif

namespace fastclip::cpu {

// Elements of a chunk. Partial results are combined in chunk order, so no result depends on the number of threads.
constexpr int64_t CHUNK = 1 << 15;

// One gradient: dense memory.
struct Segment {
  void* data;
  int64_t numel;
  int64_t first_chunk;  // index of the segment's first chunk within the table
  int64_t work;         // elements (plus a fixed cost) of all segments before this one
  void* owner;          // what `Table::written` is called with
};

// Gradients of one dtype.
struct Table {
  const Segment* segments;
  int64_t count;   // of segments
  int64_t chunks;  // of all segments
  int64_t work;    // of all segments
  Dtype dtype;
  void (*written)(void* owner);  // called once for each segment that apply or clamp has changed, from any thread
};

// Where the work is done: `parallel_for` calls body(context, begin, end) for parts of [begin, end) of at least `grain`
// indices, on up to `count` threads, and returns when all are done. It is not called if `count` is 1, which is right for
// tables of less work than SERIAL_WORK: waking the threads would cost more time than they save.
constexpr int64_t SERIAL_WORK = 1 << 16;
struct Threads {
  int64_t count;
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain,
                       void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// What an optimizer keeps beside a gradient: arrays of the gradient's dtype, size and layout.
struct StepSegment {
  void *param, *state[3];  // AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq or null; SGD: momentum_buffer or null
  float* step;             // AdamW: the number of steps taken
};

// What is decided about a step, besides the optimizer's own options.
struct StepDecision {
  const double* coef;  // gradient i is multiplied by coef[i * coef_stride] first
  int64_t coef_stride;
  const bool* frozen;  // segment i stays as it is where frozen[i * frozen_stride]; null: all are stepped
  int64_t frozen_stride;
  uint32_t seed;    // of the random numbers for stochastic rounding, another one for each step
  bool stochastic;  // bfloat16 results are stochastically rounded
  bool maximize;
  bool zero_grad;  // set the gradients to zero afterwards, those of frozen segments too
};

struct AdamWOptions { double lr, beta1, beta2, eps, weight_decay; };
struct SgdOptions {
  double lr, momentum, one_minus_dampening, weight_decay;
  bool nesterov;
};

extern "C" {

// The instruction set in use: "avx512", "avx2", "neon" or "portable". FASTCLIP_CPU_ISA, as it was when the library was
// loaded, asks for a lesser one.
FASTCLIP_API const char* fastclip_cpu_isa();

// Power sums (and maxima, if asked for) of each segment, `per_segment` [count] or null, and of everything, `total` [1].
FASTCLIP_API void fastclip_cpu_measure(const Table* table, const Threads* threads, double p, bool absmax,
                                       NormPartial* per_segment, NormPartial* total);

// Segment i times coef[i * stride], rounded to float32 unless the table is float64; 0 and 1 as `touch` in elementwise.h
// has them.
FASTCLIP_API void fastclip_cpu_apply(const Table* table, const Threads* threads, const double* coef, int64_t stride);

// Every element limited to [low, high]; memory that needs no change is not written. Returns whether any was.
FASTCLIP_API bool fastclip_cpu_clamp(const Table* table, const Threads* threads, double low, double high);

// One step of torch.optim.AdamW or torch.optim.SGD; `segments` [count] in the order of the table's.
FASTCLIP_API void fastclip_cpu_adamw(const Table* table, const Threads* threads, const StepSegment* segments,
                                     const StepDecision* decision, const AdamWOptions* options);
FASTCLIP_API void fastclip_cpu_sgd(const Table* table, const Threads* threads, const StepSegment* segments,
                                   const StepDecision* decision, const SgdOptions* options);

}  // extern "C"

}  // namespace fastclip::cpu
