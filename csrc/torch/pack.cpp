// Parameters -> table. This is most of the host time of a call with thousands of tensors, and nearly all of it is
// cache misses: parameter -> autograd metadata -> gradient -> storage. So the list is walked in blocks, one hop of the
// chain at a time, and the misses of a block overlap.
#include "pack.h"

#include <numeric>

namespace fastclip {
namespace {

constexpr size_t BLOCK = 64;
constexpr size_t MAX_KEPT = 1 << 15;  // segments whose memory is kept from call to call

// Anything that is not simply memory: wrapper subclasses, lazy conjugates and negatives, vmap, nested, sparse, meta, ...
const c10::DispatchKeySet ODD_KEYS{c10::DispatchKey::Python,           c10::DispatchKey::Conjugate,
                                   c10::DispatchKey::Negative,         c10::DispatchKey::ZeroTensor,
                                   c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                   c10::DispatchKey::Functionalize,    c10::DispatchKey::NestedTensor};

Dtype kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat   ? Dtype::F32
      : dtype == at::kDouble   ? Dtype::F64
      : dtype == at::kBFloat16 ? Dtype::BF16
                               : Dtype::F16;
}

void written(void* gradient) {
  auto* tensor = static_cast<c10::TensorImpl*>(gradient);
  if (!tensor->is_inference()) tensor->bump_version();
}

// Memory kept from call to call: asking the system for fresh pages costs more than filling them.
thread_local Overlaps kept_overlaps;
thread_local std::vector<cpu::Segment> kept_segments;

const cpu::Segment* segment_at(const Group& group, const void* data) {
  for (const auto& segment : group.segments)
    if (segment.numel > 0 && segment.data == data) return &segment;
  return nullptr;
}

bool has_gradient(const Group& group, const c10::TensorImpl* gradient) {
  return std::any_of(group.segments.begin(), group.segments.end(),
                     [gradient](const cpu::Segment& segment) { return segment.owner == gradient; });
}

Group& group_of(std::vector<Group>& groups, c10::Device device, at::ScalarType dtype, size_t expected) {
  for (auto& group : groups)
    if (group.device == device && group.dtype == dtype) return group;
  if (groups.size() == 1) {  // until now a segment's index was its position
    groups[0].positions.resize(groups[0].segments.size());
    std::iota(groups[0].positions.begin(), groups[0].positions.end(), 0);
  }
  auto& group = groups.emplace_back();
  group.device = device;
  group.dtype = dtype;
  if (groups.size() == 1) group.segments.swap(kept_segments);
  group.segments.reserve(expected);
  return group;
}

}  // namespace

bool plain(const c10::TensorImpl& g) {
  const auto dtype = c10::typeMetaToScalarType(g.dtype());
  const bool real = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
  return real && g.layout() == c10::kStrided && !g.key_set().has_any(ODD_KEYS) && g.unsafe_storage() &&
      (g.is_cpu() || g.is_cuda() || g.is_xpu()) && g.is_non_overlapping_and_dense();
}

Packed pack(const std::vector<c10::TensorImpl*>& tensors, bool gradients_of, std::vector<Group>& groups, bool* views) {
  Overlaps& overlaps = kept_overlaps;
  overlaps.expect(tensors.size());
  Group* group = nullptr;
  size_t position = 0;
  c10::TensorImpl* block[BLOCK];
  for (size_t start = 0; start < tensors.size(); start += BLOCK) {
    const size_t count = std::min(BLOCK, tensors.size() - start);
    if (gradients_of) {
      for (size_t i = 0; i < count; i++) __builtin_prefetch(tensors[start + i]);
      for (size_t i = 0; i < count; i++) __builtin_prefetch(tensors[start + i]->autograd_meta());
    }
    for (size_t i = 0; i < count; i++) {
      auto* tensor = tensors[start + i];
      block[i] = gradients_of ? tensor->grad().unsafeGetTensorImpl() : tensor;
      __builtin_prefetch(block[i]);
      __builtin_prefetch(reinterpret_cast<char*>(block[i]) + 64);
      __builtin_prefetch(reinterpret_cast<char*>(block[i]) + 128);
    }
    size_t defined = 0;
    for (size_t i = 0; i < count; i++) {
      if (block[i] == c10::UndefinedTensorImpl::singleton()) continue;
      if (!plain(*block[i])) return Packed::Odd;
      __builtin_prefetch(block[i]->storage().unsafeGetStorageImpl());
      block[defined++] = block[i];
    }
    for (size_t i = 0; i < defined; i++) {
      auto* gradient = block[i];
      const auto device = gradient->device();
      const auto dtype = c10::typeMetaToScalarType(gradient->dtype());
      if (!group || group->device != device || group->dtype != dtype)
        group = &group_of(groups, device, dtype, tensors.size());
      const size_t itemsize = c10::elementSize(dtype);
      const int64_t numel = gradient->numel();
      const auto& storage = gradient->unsafe_storage();
      char* data = static_cast<char*>(storage.mutable_data()) + gradient->storage_offset() * itemsize;
      if (numel == 0) {
        if (!overlaps.insert(reinterpret_cast<uintptr_t>(gradient)) && has_gradient(*group, gradient)) continue;
      } else {
        const auto address = reinterpret_cast<uintptr_t>(data);
        const size_t bytes = numel * itemsize;
        if (storage.nbytes() < gradient->storage_offset() * itemsize + bytes) return Packed::Odd;  // freed
        if (!overlaps.insert(address)) {
          const cpu::Segment* same = segment_at(*group, data);
          if (same && same->numel == numel) continue;  // the same gradient again counts once
          for (const auto& any : groups)
            if (segment_at(any, data)) return Packed::Odd;
        }
        overlaps.add(storage, address, bytes);
      }
      group->add(data, numel, gradient);
      if (groups.size() > 1) group->positions.push_back(position);
      position++;
    }
  }
  if (views) *views = overlaps.any_views();
  return overlaps.any_partial() ? Packed::Odd : Packed::Plain;
}

void recycle(Group&& group) {
  if (group.segments.capacity() > MAX_KEPT) return;
  group.segments.clear();
  kept_segments.swap(group.segments);
}

void Group::add(void* data, int64_t numel, c10::TensorImpl* gradient) {
  segments.push_back(cpu::next_segment(chunks, work, data, numel, gradient));
}

void Group::own() {
  if (!owners.empty()) return;
  owners.reserve(segments.size());
  storages.reserve(segments.size());
  for (size_t i = 0; i < segments.size(); i++) {
    owners.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(gradient(i)));
    storages.push_back(gradient(i)->unsafe_storage());
  }
}

bool Group::has_its_memory(size_t i) const {
  const auto& owner = *owners[i];
  return owner.unsafe_storage().is_alias_of(storages[i]) && owner.numel() == segments[i].numel &&
      static_cast<char*>(storages[i].mutable_data()) + owner.storage_offset() * c10::elementSize(dtype) ==
      segments[i].data;
}

uint64_t Group::fingerprint() const {
  uint64_t sum = uint64_t(dtype), place = 0;  // of independent terms, several of which are computed at a time
  for (const auto& segment : segments) {
    place += 0x9E3779B97F4A7C15ull;
    uint64_t mixed = (reinterpret_cast<uintptr_t>(segment.data) ^ place) * 0xBF58476D1CE4E5B9ull + segment.numel;
    mixed = (mixed ^ (mixed >> 32)) * 0x94D049BB133111EBull;
    sum += mixed ^ (mixed >> 29);
  }
  return sum;
}

void Group::bump_version(size_t i) const { written(segments[i].owner); }

cpu::Table Group::table() const {
  return {segments.data(), int64_t(segments.size()), chunks, work, kernel_dtype(dtype), written};
}

}  // namespace fastclip
