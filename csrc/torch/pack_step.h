// An optimizer's step as a multi-tensor table.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "../cpu/launch.h"
#include "pack.h"

namespace fastclip {

// What a step works on: a group of gradients, and in the same order what the optimizer keeps beside them. The group owns
// its gradients; the other tensors are kept alive by whoever keeps the StepGroup.
struct StepGroup {
  Group group;
  std::vector<cpu::StepSegment> segments;
  std::vector<c10::TensorImpl*> params;
  // The memory of all tensors but the gradients, which a tensor may lose (`p.data = x`).
  std::vector<c10::Storage> storages;

  // Tell autograd that the parameters were written, and the gradients if asked to.
  void bump_version(bool gradients) const;
};

// The StepGroup of columns of tensors in the same order: gradients, parameters, step counters (float32, or none), and a
// column for each state. Null if any of them is not as the kernels need it, or two share memory: threads step the tensors
// of a group at the same time.
std::unique_ptr<StepGroup> pack_step(const std::vector<std::vector<c10::TensorImpl*>>& columns);

// int64 [7, T] on the host: addresses of gradient, parameter, three states and step count (0: there is none), and the
// element counts.
at::Tensor step_addresses(const StepGroup& step);

}  // namespace fastclip
