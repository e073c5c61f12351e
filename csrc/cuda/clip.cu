// The CUDA backend's apply, clamp and repair over a table of gradients, one launch each whatever the number of tensors; and
// the table itself, as the host makes it. A repair is followed by a measure (measure.cu) of what it changed.
#include "../elementwise.h"
#include "interface.h"
#include "table.h"
#include "tiles.h"

namespace fastclip::cuda {
namespace {

// f(x&) for the elements [begin, end); a vector is written only if f returns true (changed) for one of its elements.
template <class D, bool BACKWARDS = false, class F>
__device__ void rewrite(typename D::Storage* base, int64_t begin, int64_t end, F f) {
  using Wide = typename D::Wide;
  auto rewritten = [&](uint4 raw, bool& changed) {
    Wide x[VECTOR<D>];
    unpack<D>(raw, x);
#pragma unroll
    for (int j = 0; j < VECTOR<D>; j++) changed |= f(x[j]);
    return packed<D>(x);
  };
  auto tile = [&](uint4* vectors) {
    uint4 raw[LOADS];
    load(raw, vectors);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      bool changed = false;
      const uint4 after = rewritten(raw[i], changed);
      if (changed) vectors[i * THREADS] = after;
    }
  };
  auto vector = [&](uint4* pointer) {
    bool changed = false;
    const uint4 after = rewritten(*pointer, changed);
    if (changed) *pointer = after;
  };
  auto element = [&](typename D::Storage* pointer) {
    Wide x = D::widen(*pointer);
    if (f(x)) *pointer = D::narrow(x);
  };
  walk<D, BACKWARDS>(base, begin, end, tile, vector, element);
}

// body(tensor, base, begin, end) for every tensor of the block's run; BACKWARDS: from its end.
template <class D, bool BACKWARDS = false, class Table, class Body>
__device__ void for_each_span(const Table& table, uint32_t tensors, uint32_t tiles, Body body) {
  auto piece = [&](uint32_t tensor, uint32_t tile, uint32_t tile_end) {
    const auto span = span_of<D>(table, tensor);
    const uint32_t first_tile = table.tile_offsets[tensor];
    body(tensor, span.base, max(span.begin, int64_t(tile - first_tile) * TILE<D>),
         min(span.end, int64_t(tile_end - first_tile) * TILE<D>));
  };
  if constexpr (BACKWARDS) for_each_piece_backwards(table, tensors, tiles, piece);
  else for_each_piece(table, tensors, tiles, piece);
}

// Every block goes through its run backwards: the measure before it went forwards, and left the ends of the runs in the L2.
// The stores are plain ones, which stay there: the optimizer reads the gradients next.
template <class D, class Table>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    apply_kernel(const __grid_constant__ Table table, uint32_t tensors, uint32_t tiles, const double* coef,
                 uint32_t stride)  // 0: one coefficient for all; 1: one a tensor
{
  using Wide = typename D::Wide;
  wait_for_previous();
  if (stride == 0 && touch(double(Wide(*coef))) == Touch::Keep) return;  // nothing is clipped: no gradient is read
  auto apply = [&](uint32_t tensor, typename D::Storage* base, int64_t begin, int64_t end) {
    const Wide c = Wide(coef[tensor * stride]);
    switch (touch(double(c))) {
      case Touch::Keep: return;
      case Touch::Zero: return zero<D>(base, begin, end);
      case Touch::Scale:
        return rewrite<D, true>(base, begin, end, [&](Wide& x) {
          x = scaled(x, c);
          return true;
        });
    }
  };
  for_each_span<D, true>(table, tensors, tiles, apply);
}

template <class D, class Table>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    clamp_kernel(const __grid_constant__ Table table, uint32_t tensors, uint32_t tiles, double low, double high,
                 bool* changed)  // [] set if anything is changed
{
  using Wide = typename D::Wide;
  bool any = false;
  for_each_span<D>(table, tensors, tiles, [&](uint32_t, typename D::Storage* base, int64_t begin, int64_t end) {
    rewrite<D>(base, begin, end, [&](Wide& x) {
      const bool outside = x < Wide(low) || x > Wide(high);
      x = clamped(x, Wide(low), Wide(high));
      any |= outside;
      return outside;
    });
  });
  if (__syncthreads_or(any) && threadIdx.x == 0) *changed = true;
}

template <class D, class Table>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    repair_kernel(const __grid_constant__ Table table, uint32_t tensors, uint32_t tiles,
                  const double* absmax,        // [tensors] as measured: finite where there is nothing to repair
                  unsigned long long* counts)  // [tensors] of zeros, to which the elements set to zero are added
{
  using Wide = typename D::Wide;
  for_each_span<D>(table, tensors, tiles, [&](uint32_t tensor, typename D::Storage* base, int64_t begin, int64_t end) {
    if (absmax[tensor] < INFINITY) return;
    unsigned long long count = 0;
    rewrite<D>(base, begin, end, [&](Wide& x) {
      const bool finite = x - x == 0;
      x = finite ? x : 0;
      count += !finite;
      return !finite;
    });
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
    if (threadIdx.x % WARP == 0 && count) atomicAdd(counts + tensor, count);
  });
}

}  // namespace

extern "C" {

int32_t fastclip_cuda_max_table() { return MAX_TABLE; }

int32_t fastclip_cuda_table_slots(int64_t tensors) { return slots_for(tensors); }

const char* fastclip_cuda_probe(int32_t device) {
  int before = device;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, apply_kernel<F32, DeviceTable>);
  if (before != device) cudaSetDevice(before);
  return message(error);
}

int64_t fastclip_cuda_pack(const int64_t* addresses, const int64_t* sizes, int64_t tensors, int32_t itemsize,
                           uint64_t* packed_address, uint32_t* tile_offsets) {
  int item = 0, tile = 0;  // their logarithms: quotients would take half of the time
  while (1 << item < itemsize) item++;
  while (1 << tile < TILE_BYTES >> item) tile++;
  const uint64_t within = (uint64_t(1) << tile) - 1;
  int64_t tiles = 0;
  uint64_t all = 0;
  for (int64_t i = 0; i < tensors; i++) {
    const uint64_t address = addresses[i];
    const int64_t size = sizes[i], end = size > 0 ? int64_t(address % 16 >> item) + size : 0;
    all |= address;
    packed_address[i] = address << 16 | (size > 0 ? uint64_t(end - 1) & within : 0);
    tile_offsets[i] = uint32_t(tiles);
    tiles += int64_t((uint64_t(end) + within) >> tile);
  }
  if (all >> 48 || tiles > INT32_MAX) return -1;
  tile_offsets[tensors] = uint32_t(tiles);
  return tiles;
}

const char* fastclip_cuda_apply(const GradTable* gradients, const double* coef, uint32_t stride) {
  return launch_over(*gradients, [&](const Launch& to, auto d, const auto& table) {
    Launch early = to;
    early.overlaps = true;
    return launch(apply_kernel<decltype(d), std::decay_t<decltype(table)>>, early, table, coef, stride);
  });
}

const char* fastclip_cuda_clamp(const GradTable* gradients, double low, double high, bool* changed) {
  return launch_over(*gradients, [&](const Launch& to, auto d, const auto& table) {
    return launch(clamp_kernel<decltype(d), std::decay_t<decltype(table)>>, to, table, low, high, changed);
  });
}

const char* fastclip_cuda_repair(const GradTable* gradients, const double* absmax, int64_t* counts) {
  return launch_over(*gradients, [&](const Launch& to, auto d, const auto& table) {
    return launch(repair_kernel<decltype(d), std::decay_t<decltype(table)>>, to, table, absmax,
                  reinterpret_cast<unsigned long long*>(counts));
  });
}

}  // extern "C"

}  // namespace fastclip::cuda
