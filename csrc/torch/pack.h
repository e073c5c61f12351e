// Gradients as multi-tensor tables: one Group per (device, dtype), one segment per gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../cpu/launch.h"

namespace fastclip {

struct Group {
  c10::Device device{c10::kCPU};
  at::ScalarType dtype{at::kFloat};
  std::vector<cpu::Segment> segments;  // whose owners are the gradients, TensorImpls
  std::vector<int64_t> positions;      // of each segment among all gradients; empty if there is no other group
  int64_t chunks = 0;
  int64_t work = 0;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> owners;  // the gradients; empty until own()
  std::vector<c10::Storage> storages;  // their memory, which a gradient may lose (`p.grad.data = x`)

  // What the CPU kernels need of a group of CPU tensors; good until the group changes.
  cpu::Table table() const;
  c10::TensorImpl* gradient(size_t i) const { return static_cast<c10::TensorImpl*>(segments[i].owner); }
  void add(void* data, int64_t numel, c10::TensorImpl* gradient);
  // Keep the gradients and their memory alive, whatever Python does to them meanwhile (`p.grad = None`, `p.grad.data = x`).
  // Without it the table is good only while the GIL is held.
  void own();
  // Whether gradient i of an owned group still has the memory that the group was made of.
  bool has_its_memory(size_t i) const;
  // A number that is practically never the same where the segments are elsewhere in memory, or of other sizes or dtype.
  uint64_t fingerprint() const;
  // Tell autograd that segment i was written.
  void bump_version(size_t i) const;
};

// Which tensors share memory: exact repeats through a hash table of addresses, partial overlaps by sorting those that are
// not alone in their storage, if any of them is a part of a larger one, or borrowed its memory (from numpy, say).
class Overlaps {
 public:
  void expect(size_t tensors) {
    size_t capacity = 16;
    while (capacity < 2 * tensors) capacity *= 2;
    slots_.assign(capacity, 0);
    views_.clear();
    parts_ = false;
    shift_ = 64 - __builtin_ctzll(capacity);
  }

  // False if the address may have been inserted before. Slots hold 32 bits of the hash, which keeps the table in the L1
  // cache; the caller distinguishes two addresses that agree in them (4 GiB apart), as it searches for the first anyway.
  bool insert(uintptr_t address) {
    const uint64_t hash = address * 0x9E3779B97F4A7C15ull;
    const uint32_t mark = uint32_t(hash) | 1;
    size_t i = hash >> shift_;
    for (; slots_[i] != 0; i = (i + 1) & (slots_.size() - 1))
      if (slots_[i] == mark) return false;
    slots_[i] = mark;
    return true;
  }

  // Records a tensor of so many bytes; true if nothing else has its storage. One that fills its storage can be
  // overlapped by others that fill it, which begin at the same address, and by views, which do not fill it.
  bool add(const c10::Storage& storage, uintptr_t address, size_t bytes) {
    const bool fills = storage.nbytes() == bytes && storage.unsafeGetStorageImpl()->resizable();
    if (fills && storage.use_count() == 1) return true;
    views_.emplace_back(address, address + bytes);
    parts_ |= !fills;
    return false;
  }

  bool any_views() const { return !views_.empty(); }

  bool any_partial() {
    if (!parts_) return false;
    std::sort(views_.begin(), views_.end());
    for (size_t i = 1; i < views_.size(); i++)
      if (views_[i].first < views_[i - 1].second) return true;
    return false;
  }

 private:
  std::vector<uint32_t> slots_;
  std::vector<std::pair<uintptr_t, uintptr_t>> views_;
  bool parts_;  // whether a tensor does not fill its storage
  int shift_;
};

// Whether a tensor is dense real memory of a dtype that the kernels know: no wrapper, no lazy negation.
bool plain(const c10::TensorImpl& tensor);

// Whether a list of gradients is packed, or needs the general packer in Python, which handles or names the odd one.
enum class Packed { Plain, Odd };

// Groups of all gradients of `tensors` (or of the tensors themselves), in order, a gradient that appears twice once: the
// same elements in memory, or, without elements, the same object. `identity` in fastclip/gradients/pack.py goes by the same rule.
// Packed::Odd if any of them is not a plain dense real tensor, or if two of them overlap; `groups` is then unusable.
// `views`: whether the storage of any of them is larger than it, or has other owners.
Packed pack(const std::vector<c10::TensorImpl*>& tensors, bool gradients_of, std::vector<Group>& groups,
            bool* views = nullptr);

// Give a group's memory to the next call of pack on this thread.
void recycle(Group&& group);

}  // namespace fastclip
