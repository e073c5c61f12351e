// The CPU backend: measure, apply and clamp over a Group, chunk by chunk on all threads.
#pragma once

#include "cpu_kernels_table.h"
#include "pack.h"

namespace fastclip::cpu {

// The instruction set in use: "avx512", "avx2" or "portable". FASTCLIP_CPU_ISA asks for a lesser one.
const char* isa();

// Power sums (and maxima, if asked for) per segment into `per_segment` (may be null), and of everything as the result.
Moments measure(const Group& group, double p, bool absmax, Moments* per_segment);

// Segment i times coef[i * stride], rounded to float32 unless the group is float64; see `touch` in elementwise.h for 0 and 1.
void apply_(const Group& group, const double* coef, int64_t stride);

// Every element limited to [low, high]; memory that needs no change is not written. True if any was.
bool clamp_(const Group& group, double low, double high);

}  // namespace fastclip::cpu
