// The CUDA backend's measure: one launch that reads all gradients once, whatever their number.
//
// Every block takes a contiguous run of tiles (tiles.h). So it meets few tensors, accumulates each in registers, and writes
// at most two partial results: of the tensor its run begins in and of the tensor it ends in. Whichever block finishes a
// tensor, or the launch, last combines the partial results of all, in block order: no float atomics, bitwise repeatable, a
// workspace of a few KiB.
#include "../elementwise.h"
#include "interface.h"
#include "table.h"
#include "tiles.h"

namespace fastclip::cuda {
namespace {

// A partial result of one thread, then of one block, is sum |x|^p and the bits of max |x|.
template <class D> using Bits = std::conditional_t<std::is_same_v<D, F64>, int64_t, int32_t>;

template <class D>
__device__ Bits<D> bits_of(typename D::Wide x) {
  if constexpr (std::is_same_v<D, F64>) return magnitude_bits<int64_t>(__double_as_longlong(x), int64_t(1) << 63);
  else return magnitude_bits<int32_t>(__float_as_int(x), int32_t(1) << 31);
}

template <class D>
__device__ double absmax_of(Bits<D> bits) {
  if constexpr (std::is_same_v<D, F64>) return __longlong_as_double(bits);
  else return double(__int_as_float(bits));
}

template <class D>
struct Sum {
  double power;
  Bits<D> bits;

  __device__ void combine(double other_power, Bits<D> other_bits) {
    power += other_power;
    bits = larger(bits, other_bits);
  }
};

// One thread's share of the elements [begin, end). In a tile each load has an accumulator of its own, in the type of the
// element, and at its end they move into a float64, so that no sum of float32s is longer than a vector.
template <class D, Norm N>
__device__ Sum<D> sum_of(typename D::Storage* base, int64_t begin, int64_t end, double p) {
  using Wide = typename D::Wide;
  Sum<D> sum{0, 0};
  if constexpr (N == Norm::Power) {  // bound by float64 logarithms, not by memory
#pragma unroll 1
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
      const Wide x = D::widen(base[i]);
      sum.combine(power_of(double(x), p), bits_of<D>(x));
    }
  } else {
    auto add = [&](Wide& total, Wide x) {
      if constexpr (N != Norm::Max) total = accumulate<N>(total, x);
      sum.bits = larger(sum.bits, bits_of<D>(x));
    };
    auto tile = [&](const uint4* vectors) {
      uint4 raw[LOADS];
      load(raw, vectors);
      Wide totals[LOADS] = {};
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        Wide x[VECTOR<D>];
        unpack<D>(raw[i], x);
#pragma unroll
        for (int j = 0; j < VECTOR<D>; j++) add(totals[i], x[j]);
      }
      if constexpr (N != Norm::Max) sum.power += double((totals[0] + totals[1]) + (totals[2] + totals[3]));
    };
    auto vector = [&](const uint4* pointer) {
      Wide total = 0, x[VECTOR<D>];
      unpack<D>(*pointer, x);
#pragma unroll
      for (int j = 0; j < VECTOR<D>; j++) add(total, x[j]);
      sum.power += double(total);
    };
    auto element = [&](const typename D::Storage* pointer) {
      Wide total = 0;
      add(total, D::widen(*pointer));
      sum.power += double(total);
    };
    walk<D>(base, begin, end, tile, vector, element);
  }
  return sum;
}

// The same with every square in float64, for squares that float32 cannot hold.
template <class D, Norm N>
__device__ double wide_power_of(const typename D::Storage* base, int64_t begin, int64_t end) {
  double power = 0;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) power = accumulate<N>(power, double(D::widen(base[i])));
  return power;
}

// The sum over all threads of the block, in a fixed order, for every thread.
template <class D>
__device__ Sum<D> block_sum(Sum<D> partial) {
  __shared__ double powers[WARPS];
  __shared__ Bits<D> maxima[WARPS];
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2)
    partial.combine(__shfl_xor_sync(0xffffffffu, partial.power, step),
                    __shfl_xor_sync(0xffffffffu, partial.bits, step));
  __syncthreads();  // the previous call's sums have been read
  if (threadIdx.x % WARP == 0) {
    powers[threadIdx.x / WARP] = partial.power;
    maxima[threadIdx.x / WARP] = partial.bits;
  }
  __syncthreads();
  Sum<D> all{powers[0], maxima[0]};
#pragma unroll
  for (int i = 1; i < WARPS; i++) all.combine(powers[i], maxima[i]);
  return all;
}

// Between launches all counters are zero.
struct Workspace {
  double* power;   // [2 blocks]: a block's partial results of the tensor its run begins in, and of the one it ends in
  double* absmax;  // [2 blocks]
  uint32_t* done;  // [blocks + 1]: how many blocks are done with the tensor that block i's run ends in, then with all
};
constexpr size_t WORKSPACE_BYTES_PER_BLOCK = 4 * sizeof(double) + sizeof(uint32_t);

// True for all threads of the last of `blocks` blocks to call this; what the others wrote before is then visible.
__device__ bool is_last(uint32_t* done, uint32_t blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(done, 1u) == blocks - 1;
    if (last) *done = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// A block's sum over results that other blocks wrote: get(i) -> {power, absmax} for i < count.
template <class Get>
__device__ Sum<F64> gather(uint32_t count, Get get) {
  Sum<F64> partial{0, 0};
  for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
    const NormPartial m = get(i);
    partial.combine(m.power, bits_of<F64>(m.absmax));
  }
  return block_sum<F64>(partial);
}

// What was measured before a repair, or nulls: tensors with a finite absmax [tensors] are unchanged, and not read again.
struct Repaired {
  const double* power;
  const double* absmax;
  __device__ bool keeps(uint32_t tensor) const { return absmax && absmax[tensor] < INFINITY; }
};

template <class D, Norm N, class Table>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    measure_kernel(const __grid_constant__ Table table, uint32_t tensors, uint32_t tiles, double p, double max_norm,
                   const double* before,  // null, or the total [2] of tensors measured before
                   Repaired repaired, Workspace work,
                   double* result,  // power [tensors], absmax [tensors], total [2], norm, clip coefficient
                   float* norm32)   // null, or the norm rounded
{
  let_next_begin();
  const uint32_t block = blockIdx.x, blocks = gridDim.x;
  for_each_piece(table, tensors, tiles, [&](uint32_t tensor, uint32_t tile, uint32_t tile_end) {
    if (repaired.keeps(tensor)) return;
    const auto span = span_of<D>(table, tensor);
    const uint32_t first_tile = table.tile_offsets[tensor], end_tile = table.tile_offsets[tensor + 1];
    const int64_t begin = max(span.begin, int64_t(tile - first_tile) * TILE<D>);
    const int64_t end = min(span.end, int64_t(tile_end - first_tile) * TILE<D>);
    const auto sum = block_sum<D>(sum_of<D, N>(span.base, begin, end, p));
    double power = sum.power;
    const double absmax = absmax_of<D>(sum.bits);
    if constexpr (!std::is_same_v<D, F64> && (N == Norm::L2 || N == Norm::L1)) {
      const bool safe = power >= VANISHING && power < INFINITY;
      if (!safe && absmax > 0 && absmax < INFINITY)
        power = block_sum<F64>({wide_power_of<D, N>(span.base, begin, end), 0}).power;
    }
    const uint32_t first_block = block_of(first_tile, tiles), last_block = block_of(end_tile - 1, tiles);
    if (first_block < last_block) {
      const uint32_t slot = 2 * block + (block == first_block);
      if (threadIdx.x == 0) {
        work.power[slot] = power;
        work.absmax[slot] = absmax;
      }
      const uint32_t count = last_block - first_block + 1;
      if (!is_last(work.done + first_block, count)) return;
      const auto all = gather(count, [&](uint32_t i) -> NormPartial {
        const uint32_t other = 2 * (first_block + i) + (i == 0);
        return {__ldcg(work.power + other), __ldcg(work.absmax + other)};
      });
      if (threadIdx.x == 0) {
        result[tensor] = all.power;
        result[tensors + tensor] = absmax_of<F64>(all.bits);
      }
    } else if (threadIdx.x == 0) {
      result[tensor] = power;
      result[tensors + tensor] = absmax;
    }
  });
  if (!is_last(work.done + blocks, blocks)) return;
  auto all = gather(tensors, [&](uint32_t i) -> NormPartial {
    if (table.tile_offsets[i] == table.tile_offsets[i + 1]) {  // no elements, so no block has written its result
      result[i] = result[tensors + i] = 0;
      return {};
    }
    if (repaired.keeps(i)) {
      result[i] = repaired.power[i];
      result[tensors + i] = repaired.absmax[i];
    }
    const double power = __ldcg(result + i);
    return {N == Norm::Power && p == 0 ? double(power != 0) : power, __ldcg(result + tensors + i)};
  });
  if (threadIdx.x == 0) {
    if (before) all.combine(before[0], bits_of<F64>(before[1]));
    const double absmax = absmax_of<F64>(all.bits), norm = finish_norm(N, p, all.power, absmax);
    double* totals = result + 2 * tensors;
    totals[0] = all.power;
    totals[1] = absmax;
    totals[2] = norm;
    totals[3] = clip_coefficient(norm, max_norm);
    if (norm32) *norm32 = float(norm);
  }
}

}  // namespace

extern "C" {

const char* fastclip_cuda_workspace_bytes(int32_t device, int64_t* bytes) {
  uint32_t blocks = 0;
  const cudaError_t error = blocks_for(device, UINT32_MAX, blocks);
  *bytes = int64_t(blocks * WORKSPACE_BYTES_PER_BLOCK + sizeof(uint32_t));
  return message(error);
}

const char* fastclip_cuda_measure(const GradTable* gradients, const MeasureOptions* options) {
  const auto& o = *options;
  uint32_t blocks = 0;  // at most, in any launch
  if (const cudaError_t error = blocks_for(gradients->device, UINT32_MAX, blocks); error != cudaSuccess)
    return message(error);
  auto* doubles = static_cast<double*>(o.workspace);
  const Workspace work{doubles, doubles + 2 * blocks, reinterpret_cast<uint32_t*>(doubles + 4 * blocks)};
  return launch_over(*gradients, [&](const Launch& to, auto d, const auto& table) {
    using D = decltype(d);
    using Table = std::decay_t<decltype(table)>;
    auto kernel = measure_kernel<D, Norm::Power, Table>;
    switch (norm_kind(o.p)) {
      case Norm::L2: kernel = measure_kernel<D, Norm::L2, Table>; break;
      case Norm::L1: kernel = measure_kernel<D, Norm::L1, Table>; break;
      case Norm::Max: kernel = measure_kernel<D, Norm::Max, Table>; break;
      case Norm::Power: break;
    }
    const Repaired repaired{o.earlier_power, o.earlier_absmax};
    return launch(kernel, to, table, o.p, o.max_norm, o.before, repaired, work, o.result, o.norm32);
  });
}

}  // extern "C"

}  // namespace fastclip::cuda
