// Parameters, gradients and an optimizer's states -> the table of a step.
#include "pack_step.h"

#include <ATen/EmptyTensor.h>

#include <utility>

namespace fastclip {
namespace {

// Whether a plain tensor's storage was not freed or shrunk.
bool has_memory(const c10::TensorImpl& tensor) {
  const size_t itemsize = c10::elementSize(c10::typeMetaToScalarType(tensor.dtype()));
  const size_t end = (tensor.storage_offset() + tensor.numel()) * itemsize;
  return tensor.numel() == 0 || tensor.unsafe_storage().nbytes() >= end;
}

// Whether an array of a parameter has its elements where the gradient has them.
bool matches(const c10::TensorImpl& tensor, const c10::TensorImpl& gradient) {
  if (!plain(tensor) || !has_memory(tensor)) return false;
  if (tensor.dtype() != gradient.dtype() || tensor.device() != gradient.device()) return false;
  if (tensor.sizes() != gradient.sizes()) return false;
  return tensor.strides() == gradient.strides() || (tensor.is_contiguous() && gradient.is_contiguous());
}

void* memory(const c10::TensorImpl& tensor) {
  return static_cast<char*>(tensor.unsafe_storage().mutable_data()) +
      tensor.storage_offset() * c10::elementSize(c10::typeMetaToScalarType(tensor.dtype()));
}

// Whether a tensor before the i-th of column c, the gradients' column left out, begins at this address.
bool holds(const std::vector<std::vector<c10::TensorImpl*>>& columns, size_t c, size_t i, const void* address) {
  for (size_t k = 1; k <= c; k++)
    for (size_t j = 0; j < (k < c ? columns[k].size() : i); j++)
      if (columns[k][j]->numel() > 0 && memory(*columns[k][j]) == address) return true;
  return false;
}

}  // namespace

std::unique_ptr<StepGroup> pack_step(const std::vector<std::vector<c10::TensorImpl*>>& columns) {
  auto made = std::make_unique<StepGroup>();
  std::vector<Group> groups;
  if (pack(columns[0], /*gradients_of=*/false, groups) == Packed::Odd || groups.size() != 1) return nullptr;
  made->group = std::move(groups[0]);
  const size_t count = made->group.segments.size();
  for (size_t c = 0; c < columns.size(); c++)
    if (columns[c].size() != count && !(c == 2 && columns[c].empty())) return nullptr;
  made->segments.resize(count);
  made->params = columns[1];
  made->storages.reserve((columns.size() - 1) * count);
  // A parameter that appears twice has a gradient that appears twice, which pack() has noticed; a state or a counter may
  // appear twice by itself.
  static thread_local Overlaps overlaps;
  overlaps.expect(3 * count);
  for (size_t c = 1; c < columns.size(); c++) {
    for (size_t i = 0; i < columns[c].size(); i++) {
      auto& tensor = *columns[c][i];
      auto& segment = made->segments[i];
      const size_t bytes = tensor.numel() * c10::elementSize(c10::typeMetaToScalarType(tensor.dtype()));
      if (c == 2) {
        if (!plain(tensor) || !has_memory(tensor) || tensor.device() != made->group.device || tensor.numel() != 1 ||
            c10::typeMetaToScalarType(tensor.dtype()) != at::kFloat)
          return nullptr;
        segment.step = static_cast<float*>(memory(tensor));
      } else {
        if (!matches(tensor, *columns[0][i])) return nullptr;
        (c == 1 ? segment.param : segment.state[c - 3]) = memory(tensor);
      }
      const auto& storage = tensor.unsafe_storage();
      if (bytes > 0) {
        const auto address = reinterpret_cast<uintptr_t>(memory(tensor));
        const bool alone = overlaps.add(storage, address, bytes);
        if ((!alone || c == 2 || c == 3) && !overlaps.insert(address) && holds(columns, c, i, memory(tensor)))
          return nullptr;
      }
      made->storages.push_back(storage);
    }
  }
  if (overlaps.any_partial()) return nullptr;
  made->group.own();
  return made;
}

at::Tensor step_addresses(const StepGroup& step) {
  const int64_t n = step.group.segments.size();
  at::Tensor table = at::detail::empty_cpu({7, n}, at::TensorOptions().dtype(at::kLong));
  auto* out = table.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; i++) {
    const auto& segment = step.group.segments[i];
    const auto& s = step.segments[i];
    const void* all[] = {segment.data, s.param, s.state[0], s.state[1], s.state[2], s.step};
    for (int64_t row = 0; row < 6; row++) out[row * n + i] = reinterpret_cast<int64_t>(all[row]);
    out[6 * n + i] = segment.numel;
  }
  return table;
}

void StepGroup::bump_version(bool gradients) const {
  for (size_t i = 0; i < group.segments.size(); i++) {
    if (!params[i]->is_inference()) params[i]->bump_version();
    if (gradients) group.bump_version(i);
  }
}

}  // namespace fastclip
