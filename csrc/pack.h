// Gradients as a multi-tensor table: one Group per (device, dtype), one Segment per gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastclip {

// Elements of a chunk on the CPU. Chunk partials are combined in chunk order, so results do not depend on threads.
constexpr int64_t CPU_CHUNK = 1 << 15;

struct Segment {
  void* data;
  int64_t numel;
  int64_t first_chunk;        // index of the segment's first CPU chunk within its group
  int64_t work;               // elements (plus a fixed cost) of all segments before this one
  c10::TensorImpl* gradient;
};

struct Group {
  c10::Device device{c10::kCPU};
  at::ScalarType dtype{at::kFloat};
  std::vector<Segment> segments;
  std::vector<int64_t> positions;  // of each segment among all gradients; empty if there is no other group
  int64_t chunks = 0;
  int64_t work = 0;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> owners;  // empty until own()

  void add(void* data, int64_t numel, c10::TensorImpl* gradient);
  // Keep the gradients alive. Without it the table is good only while the GIL is held.
  void own();
  // Tell autograd that segment i was written.
  void bump_version(size_t i) const;
};

// Dense real memory of a dtype that the kernels know, and nothing else: no wrapper, no lazy negation.
bool plain(const c10::TensorImpl& tensor);

// Why a list of gradients needs the general packer (fastclip/table.py), which handles or names the odd one.
enum class Packed { Plain, Odd };

// Groups of all gradients of `tensors` (or of the tensors themselves), in order, a gradient that appears twice once.
// Packed::Odd if any of them is not a plain dense real tensor, or if two of them overlap; `groups` is then unusable.
Packed pack(const std::vector<c10::TensorImpl*>& tensors, bool gradients_of, std::vector<Group>& groups);

// Give a group's memory to the next call of pack on this thread.
void recycle(Group&& group);

}  // namespace fastclip
