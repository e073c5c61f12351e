// The table of gradients that a kernel walks: in its parameters, so that nothing is uploaded, or, for more tensors than fit
// there, in device memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "interface.h"
#include "tiles.h"

#ifndef FASTCLIP_MAX_TABLE  // tensors of 12 bytes each: a kernel's parameters may take 32,764 bytes since CUDA 12.1
#define FASTCLIP_MAX_TABLE (CUDART_VERSION >= 12010 ? 2700 : 320)
#endif
#ifndef FASTCLIP_MEDIUM_TABLE
#define FASTCLIP_MEDIUM_TABLE 1000
#endif

namespace fastclip::cuda {

// For tensor t: its address (48 bits) above the element count of its last tile less 1 (16 bits), and the number of tiles
// of all tensors before it; a tensor without elements has no tile.
template <int N>
struct ParameterTable {
  uint64_t packed_address[N];
  uint32_t tile_offsets[N + 1];
};
struct DeviceTable {
  const uint64_t* packed_address;
  const uint32_t* tile_offsets;
};

constexpr int MAX_TABLE = FASTCLIP_MAX_TABLE;
// Smaller sizes, because a launch costs host time in proportion to its parameters.
constexpr int SMALL_TABLE = std::min(320, MAX_TABLE), MEDIUM_TABLE = std::min(FASTCLIP_MEDIUM_TABLE, MAX_TABLE);
static_assert(sizeof(ParameterTable<SMALL_TABLE>) <= 12 * SMALL_TABLE + 8 &&
              sizeof(ParameterTable<MEDIUM_TABLE>) <= 12 * MEDIUM_TABLE + 8 &&
              sizeof(ParameterTable<MAX_TABLE>) <= 12 * MAX_TABLE + 8);  // as interface.h says
static_assert(sizeof(ParameterTable<MAX_TABLE>) <= (CUDART_VERSION >= 12010 ? 32764 : 4096) - 128);

// The size of the table that holds so many tensors; 0: none in parameters.
constexpr int slots_for(int64_t tensors) {
  return tensors <= SMALL_TABLE ? SMALL_TABLE
      : tensors <= MEDIUM_TABLE ? MEDIUM_TABLE
      : tensors <= MAX_TABLE    ? MAX_TABLE
                                : 0;
}

// use(table) with the table, which is on the host if it has at most MAX_TABLE tensors, in the smallest form that holds it:
// where the host made it, if its arrays are as far apart as in that form.
template <class Use>
cudaError_t with_table(const GradTable& gradients, Use use) {
  auto as_parameters = [&](auto& table) {
    auto* whole = reinterpret_cast<const std::decay_t<decltype(table)>*>(gradients.packed_address);
    if (whole->tile_offsets == gradients.tile_offsets) return use(*whole);
    std::memcpy(table.packed_address, gradients.packed_address, gradients.tensors * sizeof(uint64_t));
    std::memcpy(table.tile_offsets, gradients.tile_offsets, (gradients.tensors + 1) * sizeof(uint32_t));
    return use(table);
  };
  const int slots = slots_for(gradients.tensors);
  if (slots == 0) return use(DeviceTable{gradients.packed_address, gradients.tile_offsets});
  if (slots == SMALL_TABLE) return as_parameters(scratch<ParameterTable<SMALL_TABLE>>());
  if (slots == MEDIUM_TABLE) return as_parameters(scratch<ParameterTable<MEDIUM_TABLE>>());
  return as_parameters(scratch<ParameterTable<MAX_TABLE>>());
}

// A tensor as the elements [begin, end) counted from a 16-byte boundary.
template <class D>
struct Span {
  typename D::Storage* base;
  int64_t begin, end;
};

template <class D, class Table>
__device__ Span<D> span_of(const Table& table, uint32_t tensor) {
  const uint64_t packed = table.packed_address[tensor];
  const uint64_t address = packed >> 16;
  const int64_t tiles = table.tile_offsets[tensor + 1] - table.tile_offsets[tensor];
  // __cvta_global_to_generic marks this as global memory; otherwise the compiler emits generic loads.
  return {static_cast<typename D::Storage*>(__cvta_global_to_generic(address & ~uint64_t(15))),
          int64_t(address & 15) / int64_t(sizeof(typename D::Storage)),
          (tiles - 1) * TILE<D> + int64_t(packed & 0xffff) + 1};
}

// launch_kernel(launch, type of the dtype, table) with the table in the smallest form that holds it.
template <class LaunchKernel>
const char* launch_over(const GradTable& gradients, LaunchKernel launch_kernel) {
  const Launch to = launch_of(gradients);
  return message(with_dtype(gradients.dtype, [&](auto d) {
    return with_table(gradients, [&](const auto& table) { return launch_kernel(to, d, table); });
  }));
}

}  // namespace fastclip::cuda
