// The C interface of the CUDA library: plain structs, raw pointers and a stream; nothing in this folder knows torch or
// Python. fastclip/native/cuda_interface.py has the same structs and functions, and a test compares the two.
//
// A function that returns a string returns null, or what went wrong. Pointers are to device memory unless said otherwise.
#pragma once

#include <cstdint>

namespace fastclip::cuda {

// ---- structs; a field that is added here needs a line in interface.cu ----

// Gradients of one dtype, as fastclip_cuda_pack describes them, and where to launch. The arrays are on the host if there
// are at most fastclip_cuda_max_table() tensors, else on the device. On the host they need not be copied on their way if
// they are one piece of memory, of 12 fastclip_cuda_table_slots() + 8 bytes, and tile_offsets is so many slots after
// packed_address.
struct GradTable {
  const uint64_t* packed_address;  // [tensors]
  const uint32_t* tile_offsets;    // [tensors + 1]
  uint32_t tensors, tiles;
  int32_t dtype;  // a Dtype of elementwise.h
  int32_t device;
  void* stream;
};

struct MeasureOptions {
  double p, max_norm;            // an infinite max_norm gives the coefficient 1
  const double* before;          // the total [2] of tensors measured before, or null
  const double* earlier_power;   // [tensors], what was measured before a repair, or null; tensors whose earlier_absmax
  const double* earlier_absmax;  // [tensors] is finite are not read again
  void* workspace;               // fastclip_cuda_workspace_bytes
  double* result;                // power [tensors], absmax [tensors], total [2], norm, clip coefficient
  float* norm32;                 // the norm rounded, or null
};

// What an optimizer steps, as fastclip_cuda_pack_step describes it, and where to launch. The arrays are on the host if
// there are at most fastclip_cuda_max_step_table() tensors, else on the device.
struct StepTable {
  const int64_t* rows;           // [7, tensors]: addresses of gradient, parameter, three states and step count; numel
  const uint32_t* tile_offsets;  // [tensors + 1]
  void* workspace;               // fastclip_cuda_step_bytes
  void* stream;
  uint32_t tensors, tiles;
  int32_t dtype;   // a Dtype of elementwise.h
  int32_t states;  // 2, or 3 with AMSGrad, for AdamW; 0, or 1 with momentum, for SGD
  int32_t device;
};

// What is decided about a step, besides the optimizer's own options. A stride is 0 (one value for all) or 1 (one a tensor).
struct StepDecision {
  const double* coef;      // the gradients are multiplied by it first
  const bool* frozen;      // tensors that stay as they are, or null
  const void* lr_pointer;  // null, or a float32 (lr_itemsize 4) or float64 that stands for `lr`
  double lr;
  int64_t seed;  // for stochastic rounding of bfloat16; negative: round to nearest
  uint32_t coef_stride, frozen_stride;
  int32_t lr_itemsize;
  bool maximize;
  bool zero_grad;  // set the gradients to zero afterwards, those of frozen tensors too
};

struct AdamWOptions { double beta1, beta2, eps, weight_decay; };

struct SgdOptions {
  double momentum, one_minus_dampening, weight_decay;  // one_minus_dampening: 1 in the first step
  bool nesterov;
};

// ---- functions ----

extern "C" {

// Field i of all structs above: returns "Struct.field", and its offset and size in bytes; "Struct" for the size of a whole
// one. Null after the last. For the test that compares them with Python's.
const char* fastclip_cuda_field(int32_t i, uint32_t* offset, uint32_t* size);

// The most tensors whose table travels in the kernels' parameters; the tables of more are read from device memory.
int32_t fastclip_cuda_max_table();
int32_t fastclip_cuda_max_step_table();

// How many tensors the kernels' parameters are made for where so many travel in them; 0: none do.
int32_t fastclip_cuda_table_slots(int64_t tensors);

// Whether the kernels can run on a device: it may be of an architecture that they were not compiled for.
const char* fastclip_cuda_probe(int32_t device);

// Bytes of the workspace that fastclip_cuda_measure needs on a device; zeroed once, then left to it, one for each stream.
const char* fastclip_cuda_workspace_bytes(int32_t device, int64_t* bytes);

// Bytes of the workspace that a step of so many tensors needs; in any state before and after.
int64_t fastclip_cuda_step_bytes(int64_t tensors);

// On the host: the table of tensors at `addresses` with `sizes` elements of `itemsize` bytes. Returns the number of tiles,
// or -1 if there is an address or a number of tiles that the table cannot hold.
int64_t fastclip_cuda_pack(const int64_t* addresses, const int64_t* sizes, int64_t tensors, int32_t itemsize,
                           uint64_t* packed_address, uint32_t* tile_offsets);

// On the host: the tile_offsets of `rows`. Returns the number of tiles, or -1 if there are too many.
int64_t fastclip_cuda_pack_step(const int64_t* rows, int64_t tensors, int32_t itemsize, int32_t states,
                                uint32_t* tile_offsets);

const char* fastclip_cuda_measure(const GradTable* gradients, const MeasureOptions* options);

// coef: one (stride 0) or one a tensor (stride 1).
const char* fastclip_cuda_apply(const GradTable* gradients, const double* coef, uint32_t stride);

// changed: set if any element was outside [low, high].
const char* fastclip_cuda_clamp(const GradTable* gradients, double low, double high, bool* changed);

// absmax [tensors]: as measured; counts [tensors]: to which the number of elements set to zero is added.
const char* fastclip_cuda_repair(const GradTable* gradients, const double* absmax, int64_t* counts);

// One step of torch.optim.AdamW or torch.optim.SGD.
const char* fastclip_cuda_adamw(const StepTable* table, const StepDecision* decision, const AdamWOptions* options);
const char* fastclip_cuda_sgd(const StepTable* table, const StepDecision* decision, const SgdOptions* options);

}  // extern "C"

}  // namespace fastclip::cuda
