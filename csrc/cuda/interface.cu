// The layout of the structs of interface.h, for the test that compares it with Python's.
#include <cstddef>
#include <type_traits>

#include "interface.h"

namespace fastclip::cuda {
namespace {

struct Field {
  const char* name;
  uint32_t offset, size;
};

#define STRUCT(S) {#S, 0, sizeof(S)}
#define FIELD(S, F) {#S "." #F, uint32_t(offsetof(S, F)), sizeof(S::F)}

constexpr Field FIELDS[] = {
    STRUCT(GradTable),
    FIELD(GradTable, packed_address),
    FIELD(GradTable, tile_offsets),
    FIELD(GradTable, tensors),
    FIELD(GradTable, tiles),
    FIELD(GradTable, dtype),
    FIELD(GradTable, device),
    FIELD(GradTable, stream),
    STRUCT(MeasureOptions),
    FIELD(MeasureOptions, p),
    FIELD(MeasureOptions, max_norm),
    FIELD(MeasureOptions, before),
    FIELD(MeasureOptions, earlier_power),
    FIELD(MeasureOptions, earlier_absmax),
    FIELD(MeasureOptions, workspace),
    FIELD(MeasureOptions, result),
    FIELD(MeasureOptions, norm32),
    STRUCT(StepTable),
    FIELD(StepTable, rows),
    FIELD(StepTable, tile_offsets),
    FIELD(StepTable, workspace),
    FIELD(StepTable, stream),
    FIELD(StepTable, tensors),
    FIELD(StepTable, tiles),
    FIELD(StepTable, dtype),
    FIELD(StepTable, states),
    FIELD(StepTable, device),
    STRUCT(StepDecision),
    FIELD(StepDecision, coef),
    FIELD(StepDecision, frozen),
    FIELD(StepDecision, lr_pointer),
    FIELD(StepDecision, lr),
    FIELD(StepDecision, seed),
    FIELD(StepDecision, coef_stride),
    FIELD(StepDecision, frozen_stride),
    FIELD(StepDecision, lr_itemsize),
    FIELD(StepDecision, maximize),
    FIELD(StepDecision, zero_grad),
    STRUCT(AdamWOptions),
    FIELD(AdamWOptions, beta1),
    FIELD(AdamWOptions, beta2),
    FIELD(AdamWOptions, eps),
    FIELD(AdamWOptions, weight_decay),
    STRUCT(SgdOptions),
    FIELD(SgdOptions, momentum),
    FIELD(SgdOptions, one_minus_dampening),
    FIELD(SgdOptions, weight_decay),
    FIELD(SgdOptions, nesterov),
};

static_assert(std::is_standard_layout_v<GradTable> && std::is_standard_layout_v<MeasureOptions> &&
              std::is_standard_layout_v<StepTable> && std::is_standard_layout_v<StepDecision> &&
              std::is_standard_layout_v<AdamWOptions> && std::is_standard_layout_v<SgdOptions>);

}  // namespace

extern "C" const char* fastclip_cuda_field(int32_t i, uint32_t* offset, uint32_t* size) {
  if (i < 0 || size_t(i) >= sizeof(FIELDS) / sizeof(FIELDS[0])) return nullptr;
  *offset = FIELDS[i].offset;
  *size = FIELDS[i].size;
  return FIELDS[i].name;
}

}  // namespace fastclip::cuda
