// What the CUDA kernels share: how elements are stored, how tiles are assigned to blocks, how a block walks over its part
// of a tensor, and how a kernel is launched.
//
// Tensors are divided into tiles, numbered consecutively over all tensors, and every block takes a contiguous run of tiles.
// A tensor is addressed from its address rounded down to 16 bytes, so that all but its edges are 16-byte accesses however
// it is aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../elementwise.h"

#ifndef FASTCLIP_THREADS
#define FASTCLIP_THREADS 256
#endif

namespace fastclip::cuda {

constexpr int THREADS = FASTCLIP_THREADS;
constexpr int WARP = 32, WARPS = THREADS / WARP;
constexpr int BLOCKS_PER_SM = 4;
constexpr int LOADS = 4;  // 16-byte loads a thread has in flight
constexpr int TILE_BYTES = THREADS * LOADS * 16;

// ---- dtypes ----

// How a gradient's elements are stored, and the type they are computed in.
struct F32 {
  using Storage = float;
  using Wide = float;
  __device__ static Wide widen(Storage x) { return x; }
  __device__ static Storage narrow(Wide x) { return x; }
};
struct F64 {
  using Storage = double;
  using Wide = double;
  __device__ static Wide widen(Storage x) { return x; }
  __device__ static Storage narrow(Wide x) { return x; }
};
struct BF16 {
  using Storage = uint16_t;
  using Wide = float;
  __device__ static Wide widen(Storage x) { return __uint_as_float(uint32_t(x) << 16); }
  __device__ static Storage narrow(Wide x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};
struct F16 {
  using Storage = uint16_t;
  using Wide = float;
  __device__ static Wide widen(Storage x) { return __half2float(__ushort_as_half(x)); }
  __device__ static Storage narrow(Wide x) { return __half_as_ushort(__float2half_rn(x)); }
};

template <class D> constexpr int VECTOR = 16 / sizeof(typename D::Storage);        // elements of 16 bytes
template <class D> constexpr int TILE = TILE_BYTES / sizeof(typename D::Storage);  // elements of a tile

template <class D>
__device__ void unpack(const uint4& raw, typename D::Wide (&x)[VECTOR<D>]) {
  if constexpr (sizeof(typename D::Storage) == 2) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = D::widen(uint16_t(words[i] & 0xffff));
      x[2 * i + 1] = D::widen(uint16_t(words[i] >> 16));
    }
  } else {
    memcpy(x, &raw, 16);
  }
}

template <class D>
__device__ uint4 joined(const typename D::Storage (&x)[VECTOR<D>]) {
  uint4 raw;
  if constexpr (sizeof(typename D::Storage) == 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = x[2 * i] | uint32_t(x[2 * i + 1]) << 16;
    raw = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    memcpy(&raw, x, 16);
  }
  return raw;
}

template <class D>
__device__ uint4 packed(const typename D::Wide (&x)[VECTOR<D>]) {
  typename D::Storage narrow[VECTOR<D>];
#pragma unroll
  for (int i = 0; i < VECTOR<D>; i++) narrow[i] = D::narrow(x[i]);
  return joined<D>(narrow);
}

// Makes the compiler issue the load of `raw` before this point; otherwise it delays the load until the value is used.
__device__ inline void keep(uint4& raw) { asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w)); }

// Loads a thread's vectors of a tile.
__device__ inline void load(uint4 (&raw)[LOADS], const uint4* vectors) {
#pragma unroll
  for (int i = 0; i < LOADS; i++) raw[i] = vectors[i * THREADS];
#pragma unroll
  for (int i = 0; i < LOADS; i++) keep(raw[i]);
}

// ---- walk ----

// The block whose run of tiles contains this tile; `run_begin` is its inverse.
__device__ inline uint32_t block_of(uint32_t tile, uint32_t tiles) {
  return uint32_t(((uint64_t(tile) + 1) * gridDim.x - 1) / tiles);
}
__device__ inline uint32_t run_begin(uint32_t block, uint32_t tiles) {
  return uint32_t(uint64_t(tiles) * block / gridDim.x);
}

// The tensor that a tile belongs to: the last one that starts at it or before.
template <class Table>
__device__ uint32_t tensor_of(const Table& table, uint32_t tensors, uint32_t tile) {
  uint32_t tensor = 0;
  for (uint32_t after = tensors; after - tensor > 1;) {
    const uint32_t middle = (tensor + after) / 2;
    if (table.tile_offsets[middle] <= tile) tensor = middle;
    else after = middle;
  }
  return tensor;
}

// body(tensor, its first tile of this block's run, its last tile + 1) for every tensor that the run meets.
template <class Table, class Body>
__device__ void for_each_piece(const Table& table, uint32_t tensors, uint32_t tiles, Body body) {
  uint32_t tile = run_begin(blockIdx.x, tiles);
  const uint32_t end = run_begin(blockIdx.x + 1, tiles);
  if (tile == end) return;
  uint32_t tensor = tensor_of(table, tensors, tile);
  while (tile < end) {
    const uint32_t next = table.tile_offsets[tensor + 1];
    if (next > tile) {
      body(tensor, tile, min(end, next));
      tile = min(end, next);
    }
    tensor++;
  }
}

// The same from the run's end to its beginning.
template <class Table, class Body>
__device__ void for_each_piece_backwards(const Table& table, uint32_t tensors, uint32_t tiles, Body body) {
  const uint32_t begin = run_begin(blockIdx.x, tiles);
  uint32_t end = run_begin(blockIdx.x + 1, tiles);
  if (begin == end) return;
  uint32_t tensor = tensor_of(table, tensors, end - 1);
  while (begin < end) {
    const uint32_t tile = max(begin, table.tile_offsets[tensor]);
    if (tile < end) {
      body(tensor, tile, end);
      end = tile;
    }
    tensor--;
  }
}

// The elements [begin, end), counted from a 16-byte boundary, in 16-byte vectors as far as they go: tile(its first element)
// for whole tiles, vector(its first element) and element(its index) for the edges. BACKWARDS: the last tile first.
template <int VECTOR, int TILE, bool BACKWARDS = false, class TileBody, class VectorBody, class ElementBody>
__device__ void walk(int64_t begin, int64_t end, TileBody tile, VectorBody vector, ElementBody element) {
  const int thread = threadIdx.x;
  const int64_t full_begin = (begin + TILE - 1) / TILE * TILE;
  const int64_t full_end = max(end / TILE * TILE, full_begin);
  if constexpr (BACKWARDS)
    for (int64_t offset = full_end; offset > full_begin;) tile(offset -= TILE);
  else
    for (int64_t offset = full_begin; offset < full_end; offset += TILE) tile(offset);
#pragma unroll 1
  for (int edge = 0; edge < 2; edge++) {
    const int64_t from = edge ? max(full_end, begin) : begin, to = edge ? end : min(full_begin, end);
    if (from >= to || (edge && full_begin > end)) continue;
    const int64_t vectors_begin = (from + VECTOR - 1) / VECTOR, vectors_end = to / VECTOR;
    for (int64_t v = vectors_begin + thread; v < vectors_end; v += THREADS) vector(v * VECTOR);
    // Less than a vector is left on either side; if there is no vector boundary in between, all of it belongs to the head.
    const int64_t head_end = min(vectors_begin * VECTOR, to);
    if (from + thread < head_end) element(from + thread);
    const int64_t tail_begin = max(vectors_end * VECTOR, head_end);
    if (tail_begin + thread < to) element(tail_begin + thread);
  }
}

// The same of one array: tile(pointer to LOADS vectors, THREADS apart), vector(pointer) and element(pointer).
template <class D, bool BACKWARDS = false, class TileBody, class VectorBody, class ElementBody>
__device__ void walk(typename D::Storage* base, int64_t begin, int64_t end, TileBody tile, VectorBody vector,
                     ElementBody element) {
  walk<VECTOR<D>, TILE<D>, BACKWARDS>(
      begin, end, [&](int64_t offset) { tile(reinterpret_cast<uint4*>(base + offset) + threadIdx.x); },
      [&](int64_t offset) { vector(reinterpret_cast<uint4*>(base + offset)); },
      [&](int64_t offset) { element(base + offset); });
}

template <class D>
__device__ void zero(typename D::Storage* base, int64_t begin, int64_t end) {
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  walk<D>(
      base, begin, end,
      [&](uint4* vectors) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) vectors[i * THREADS] = zeros;
      },
      [&](uint4* pointer) { *pointer = zeros; }, [&](typename D::Storage* pointer) { *pointer = 0; });
}

// ---- overlap ----

// Programmatic dependent launch (sm_90): a kernel that is launched with Launch::overlaps may begin once every block of the
// kernel before it on the stream has called let_next_begin() or has ended, instead of when all of that kernel's writes are
// there. So it must be the first thing of such a kernel, in all of its threads, to call wait_for_previous(), which returns
// when the kernel before has ended and all that it wrote can be seen: neither may anything be read or written before, nor
// may a thread end without having called it. The latter is for those who come later: a grid that ended without waiting
// would be an end of "the kernel before" to the next one, while what came before it is still running. With it, the end of
// any of our kernels means that all before it on the stream have ended, whatever stands between a measure and an apply:
// kernels launched as usual begin only after everything before them has ended, and those launched like ours wait.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where it is called makes no difference to what the next kernel sees, which waits for the end of this one. It takes
// effect when all blocks have called it, so that blocks that wait never keep those of this kernel from starting.
__device__ inline void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- launch ----

// Everything a launch needs but the kernel's own arguments.
struct Launch {
  uint32_t tensors, tiles;
  int device;
  cudaStream_t stream;
  int blocks_per_sm = BLOCKS_PER_SM;
  bool overlaps = false;  // with the end of the kernel before it, which it waits for itself
};

// Of a table of interface.h.
template <class Table>
Launch launch_of(const Table& table) {
  return {table.tensors, table.tiles, table.device, static_cast<cudaStream_t>(table.stream)};
}

// A buffer of this thread, to be overwritten: a launch copies a table from it.
template <class T>
T& scratch() {
  static thread_local T buffer;
  return buffer;
}

inline cudaError_t blocks_for(int device, uint32_t tiles, uint32_t& blocks, int blocks_per_sm = BLOCKS_PER_SM) {
  int units = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
  blocks = std::max(1u, std::min(tiles, uint32_t(units * blocks_per_sm)));
  return error;
}

// Whether a kernel of ours that is launched to overlap does wait: it was compiled for sm_90 or more, which a GPU of that
// kind alone does not tell where it runs PTX for an older one. CUDA 12.3 is the first that takes such launches into graphs.
inline bool can_overlap([[maybe_unused]] const void* kernel, [[maybe_unused]] int device) {
#if CUDART_VERSION >= 12030
  constexpr int8_t NO = 1, YES = 2;
  static std::atomic<int8_t> known[64];  // the same for all kernels of this library
  if (device < 0 || device >= 64) return false;
  int8_t answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes attributes{};
    int driver = 0;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess || cudaDriverGetVersion(&driver) != cudaSuccess)
      return false;
    answer = attributes.ptxVersion >= 90 && driver >= 12030 ? YES : NO;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == YES;
#else
  return false;
#endif
}

// A kernel as the runtime knows it; the emulation needs its type.
template <class Kernel>
auto entry(Kernel* kernel) {
#ifdef __CUDACC__
  return reinterpret_cast<const void*>(kernel);
#else
  return kernel;
#endif
}

// The only place where a kernel is launched: on its device, on its stream, and with the launch checked.
template <class Table, class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Table, uint32_t, uint32_t, Parameters...), const Launch& to, const Table& table,
                   const Arguments&... arguments) {
  int before = to.device;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != to.device) error = cudaSetDevice(to.device);
  cudaLaunchConfig_t config{};
  uint32_t blocks = 1;
  if (error == cudaSuccess) error = blocks_for(to.device, to.tiles, blocks, to.blocks_per_sm);
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(THREADS);
  config.stream = to.stream;
#if CUDART_VERSION >= 12030
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  cudaStreamCaptureStatus captured = cudaStreamCaptureStatusNone;  // in a graph its edges say what waits for what
  if (error == cudaSuccess && to.overlaps && can_overlap(reinterpret_cast<const void*>(kernel), to.device) &&
      cudaStreamIsCapturing(to.stream, &captured) == cudaSuccess && captured == cudaStreamCaptureStatusNone)
    config.numAttrs = 1;
#endif
  // By pointers: the template that takes arguments copies the table, up to 32 KB of it, once more.
  std::tuple<uint32_t, uint32_t, Parameters...> rest(to.tensors, to.tiles, Parameters(arguments)...);
  if (error == cudaSuccess)
    error = std::apply(
        [&](auto&... each) {
          void* pointers[] = {const_cast<Table*>(&table), &each...};
          return cudaLaunchKernelExC(&config, entry(kernel), pointers);
        },
        rest);
  if (before != to.device) cudaSetDevice(before);
  return error;
}

template <class Use>
cudaError_t with_dtype(int dtype, Use use) {
  switch (Dtype(dtype)) {
    case Dtype::F32: return use(F32());
    case Dtype::F64: return use(F64());
    case Dtype::BF16: return use(BF16());
    default: return use(F16());
  }
}

inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace fastclip::cuda
