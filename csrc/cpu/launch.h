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

// The cost of starting on a segment, in elements; balances threads over tiny tensors.
constexpr int64_t SEGMENT_COST = 256;

// The segment that follows those of so many chunks and so much work, which then count it too.
inline Segment next_segment(int64_t& chunks, int64_t& work, void* data, int64_t numel, void* owner) {
  const Segment segment{data, numel, chunks, work, owner};
  chunks += (numel + CHUNK - 1) / CHUNK;
  work += numel + SEGMENT_COST;
  return segment;
}

// Where the work is done: up to `count` threads. `parallel_for` is torch_parallel_for of torch's stable C interface, so
// that the threads are torch's own: it calls body(begin, end, context) for parts of [begin, end) of at least `grain`
// indices and returns when all are done. It is not called where one thread is enough.
struct Threads {
  int64_t count;
  int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain,
                          void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

// What one read tells of all gradients of one or more tables.
struct GlobalNorm {
  double power, absmax;  // p = 0: power counts the gradients that are not all zero
  double norm, coef;     // coef: clip_coefficient(norm, max_norm)
};

struct ClipOptions {
  double p, max_norm;
  bool write;             // scale the gradients by the coefficient, not only measure
  bool refuse_nonfinite;  // write nothing if the norm is inf or NaN
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

// The same with what follows from it: the norm of this table and of what was measured `before` (or null), and its clip
// coefficient.
FASTCLIP_API void fastclip_cpu_global_norm(const Table* table, const Threads* threads, double p, double max_norm,
                                           const NormPartial* before, NormPartial* per_segment, GlobalNorm* result);

// Measure, decide and apply for several tables as one: their norm clipped to max_norm. `per_segment` (or null) is for the
// segments of all tables; only with it are maxima measured. Returns whether nothing was written because of
// `refuse_nonfinite`.
FASTCLIP_API bool fastclip_cpu_clip(const Table* tables, int64_t count, const Threads* threads,
                                    const ClipOptions* options, NormPartial* per_segment, GlobalNorm* result);

// For callers without these structs: fills `segments` [count] and `table` from addresses and element counts.
// written[i] becomes 1 where apply, clamp or clip has changed gradient i.
FASTCLIP_API void fastclip_cpu_table(const int64_t* addresses, const int64_t* numels, int64_t count, int32_t dtype,
                                     char* written, Segment* segments, Table* table);

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
