// The CUDA backend's optimizer steps: two launches whatever the number of tensors.
//
// A small one goes first, a thread a tensor: it advances the step counts and computes each tensor's constants, from values
// on the device that the host never reads. The addresses come in its parameters, as far as they fit there, and it writes
// them to device memory, so that nothing is uploaded. Then one pass goes over everything, as in clip.cu, but a tile is of
// several arrays, and where the arrays of a tensor are not aligned alike, their elements are processed one by one.
#include "../elementwise.h"
#include "interface.h"
#include "tiles.h"

#ifndef FASTCLIP_MAX_STEP_TABLE  // tensors of 60 bytes each: see table.h
#define FASTCLIP_MAX_STEP_TABLE (CUDART_VERSION >= 12010 ? 512 : 60)
#endif

namespace fastclip::cuda {
namespace {

// ---- tables and optimizers ----

// For tensor t: rows[r * tensors + t] with r of a Row, and the number of tiles of all tensors before it. On the device.
struct DeviceStepTable {
  const int64_t* rows;
  const uint32_t* tile_offsets;
};
enum Row : uint32_t { GRADIENT, PARAMETER, STATES, STEP = 5, NUMEL, ROWS };

// The same in a kernel's parameters.
template <int N>
struct ParameterStepTable {
  int64_t rows[ROWS * N];
  uint32_t tile_offsets[N + 1];
};
constexpr int MAX_STEP_TABLE = FASTCLIP_MAX_STEP_TABLE;
constexpr int SMALL_STEP_TABLE = MAX_STEP_TABLE < 60 ? MAX_STEP_TABLE : 60;
static_assert(sizeof(ParameterStepTable<MAX_STEP_TABLE>) <= (CUDART_VERSION >= 12010 ? 32764 : 4096) - 256);

// bfloat16, stochastically rounded.
struct StochasticBF16 : BF16 {};

template <class S>
__device__ S root(S x) {
  if constexpr (sizeof(S) == 4) return sqrtf(x);
  else return sqrt(x);
}

// The optimizers' elementwise steps: x holds a parameter, its gradient and its states.
template <bool AMSGRAD>
struct AdamWStep {
  static constexpr int COUNT = AMSGRAD ? 5 : 4;
  template <class S> using Constants = AdamW<S>;
  template <class S>
  __device__ static void take(const AdamW<S>& c, S (&x)[COUNT]) {
    c.template operator()<AMSGRAD>(x[0], x[1], x[2], x[3], x[COUNT - 1], root<S>);
  }
};

template <bool MOMENTUM, bool NESTEROV>
struct SgdStep {
  static constexpr int COUNT = MOMENTUM ? 3 : 2;
  template <class S> using Constants = Sgd<S>;
  template <class S>
  __device__ static void take(const Sgd<S>& c, S (&x)[COUNT]) {
    c.template operator()<MOMENTUM, NESTEROV>(x[0], x[1], x[COUNT - 1]);
  }
};

// 16-byte loads a thread has in flight of each of `count` arrays, and the elements of each in a tile.
__host__ __device__ constexpr int loads_of_each(int count) { return count <= 3 ? 2 : 1; }
__host__ __device__ constexpr int step_tile(int count, int itemsize) {
  return THREADS * loads_of_each(count) * 16 / itemsize;
}

// ---- prepare ----

enum class Work : int { Frozen, FromZeros, FromGradient };

// The parameters of the step of one tensor.
template <class Constants>
struct alignas(16) Prepared {
  Constants constants;
  Work work;
};

template <class S>
__device__ AdamW<S> constants_of(const AdamWOptions& o, double coef, double lr, float* step) {
  const double t = *step += 1;
  const double bias1 = 1 - pow(o.beta1, t), bias2 = 1 - pow(o.beta2, t);
  return {S(coef),
          S(1 - lr * o.weight_decay),
          lerp_factor<S>(o.beta1),
          S(o.beta2),
          S(1 - o.beta2),
          S(lr / bias1),
          S(1 / sqrt(bias2)),
          S(o.eps)};
}
template <class S>
__device__ Sgd<S> constants_of(const SgdOptions& o, double coef, double lr, float*) {
  return {S(coef), S(o.weight_decay), S(o.momentum), S(o.one_minus_dampening), S(lr)};
}

template <class Constants, class S, class Options, class Table>
__global__ void __launch_bounds__(THREADS)
    prepare_kernel(const __grid_constant__ Table table, uint32_t tensors, uint32_t, StepDecision d, Options options,
                   Prepared<Constants>* prepared, int64_t* rows,
                   uint32_t* tile_offsets)  // where to write the table, if it is not on the device already
{
  double lr = d.lr;
  if (d.lr_pointer)
    lr = d.lr_itemsize == 4 ? double(*static_cast<const float*>(d.lr_pointer))
                            : *static_cast<const double*>(d.lr_pointer);
  for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < tensors; i += gridDim.x * THREADS) {
    if constexpr (!std::is_same_v<Table, DeviceStepTable>) {
      for (uint32_t row = 0; row < ROWS; row++) rows[row * tensors + i] = table.rows[row * tensors + i];
      tile_offsets[i + 1] = table.tile_offsets[i + 1];
      if (i == 0) tile_offsets[0] = 0;
    }
    if (d.frozen && d.frozen[i * d.frozen_stride]) {
      prepared[i].work = Work::Frozen;
      continue;
    }
    const S coef = S(d.coef[i * d.coef_stride]);  // rounded first: one that rounds to 0 means a gradient of zeros
    auto* step = reinterpret_cast<float*>(table.rows[STEP * tensors + i]);
    prepared[i] = {constants_of<S>(options, d.maximize ? -coef : coef, lr, step),
                   touch(coef) == Touch::Zero ? Work::FromZeros : Work::FromGradient};
  }
}

// ---- step ----

// Random numbers of a tensor, different for each of its arrays; the same as on the CPU.
struct Noise {
  uint32_t key;
  __device__ uint32_t operator()(int array, int64_t element) const {
    return upper_random_bits(uint32_t(element), key + array) >> 16;
  }
};

template <class D>
__device__ typename D::Storage narrowed(typename D::Wide x, const Noise& noise, int array, int64_t element) {
  if constexpr (std::is_same_v<D, StochasticBF16>)
    return typename D::Storage(round_to_bf16_stochastically(__float_as_uint(x), noise(array, element)));
  else return D::narrow(x);
}

// The arrays of a tensor, in the order parameter, gradient, states, and the step that is taken over them.
template <class D, class Op>
struct Stepper {
  using Storage = typename D::Storage;
  using Wide = typename D::Wide;
  static constexpr int COUNT = Op::COUNT, N = VECTOR<D>;

  Storage* base[COUNT];  // the elements [begin, end) are at base[k] + begin
  typename Op::template Constants<Wide> constants;
  bool from_zeros, zero_grad;
  Noise noise;
  int64_t begin;

  // EACH 16-byte vectors of each array, THREADS apart; all are loaded before the first is processed.
  template <int EACH>
  __device__ void vectors(int64_t offset) const {
    uint4 raw[EACH][COUNT];
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int k = 0; k < COUNT; k++) {
        const auto* from = reinterpret_cast<const uint4*>(base[k] + offset) + i * THREADS;
        raw[i][k] = k == 1 && from_zeros ? make_uint4(0, 0, 0, 0) : *from;
      }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int k = 0; k < COUNT; k++) keep(raw[i][k]);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      Wide x[COUNT][N];
#pragma unroll
      for (int k = 0; k < COUNT; k++) unpack<D>(raw[i][k], x[k]);
      Storage after[COUNT][N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        Wide at[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++) at[k] = x[k][j];
        Op::take(constants, at);
#pragma unroll
        for (int k = 0; k < COUNT; k++)
          after[k][j] = narrowed<D>(at[k], noise, k, offset + i * THREADS * N + j - begin);
      }
#pragma unroll
      for (int k = 0; k < COUNT; k++) {
        auto* to = reinterpret_cast<uint4*>(base[k] + offset) + i * THREADS;
        if (k != 1) *to = joined<D>(after[k]);
        else if (zero_grad) *to = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // EACH elements of each array, THREADS apart.
  template <int EACH>
  __device__ void elements(int64_t offset) const {
    Wide x[EACH][COUNT];
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int k = 0; k < COUNT; k++)
        x[i][k] = k == 1 && from_zeros ? Wide(0) : D::widen(base[k][offset + i * THREADS]);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int64_t at = offset + i * THREADS;
      Op::take(constants, x[i]);
#pragma unroll
      for (int k = 0; k < COUNT; k++) {
        if (k != 1) base[k][at] = narrowed<D>(x[i][k], noise, k, at - begin);
        else if (zero_grad) base[k][at] = 0;
      }
    }
  }
};

// Blocks that share a multiprocessor: fewer for the kernels that need more registers, which are those of float64 (root and
// quotient) and the one that rounds four results stochastically.
template <class D, class Op>
constexpr int STEP_BLOCKS_PER_SM = std::is_same_v<D, F64> ? 2
    : std::is_same_v<D, StochasticBF16> && Op::COUNT == 5 ? 3
                                                          : BLOCKS_PER_SM;

template <class D, class Op>
__global__ void __launch_bounds__(THREADS, STEP_BLOCKS_PER_SM<D, Op>)
    step_kernel(const __grid_constant__ DeviceStepTable table, uint32_t tensors, uint32_t tiles,
                const Prepared<typename Op::template Constants<typename D::Wide>>* prepared, bool zero_grad,
                uint32_t seed) {
  using Storage = typename D::Storage;
  constexpr int COUNT = Op::COUNT, EACH = loads_of_each(COUNT), TILE = step_tile(COUNT, sizeof(Storage));
  for_each_piece(table, tensors, tiles, [&](uint32_t tensor, uint32_t tile, uint32_t tile_end) {
    const Work work = prepared[tensor].work;
    if (work == Work::Frozen && !zero_grad) return;
    // In elements, counted from the gradient's last 16-byte boundary before it.
    const int64_t begin = (table.rows[GRADIENT * tensors + tensor] & 15) / int64_t(sizeof(Storage));
    const int64_t end = begin + table.rows[NUMEL * tensors + tensor];
    const uint32_t first_tile = table.tile_offsets[tensor];
    const int64_t from = max(begin, int64_t(tile - first_tile) * TILE),
                  to = min(end, int64_t(tile_end - first_tile) * TILE);
    auto base = [&](uint32_t row, bool& aligned) {
      const uint64_t address = table.rows[row * tensors + tensor] - begin * sizeof(Storage);
      aligned &= address % 16 == 0;
      // __cvta_global_to_generic marks this as global memory; otherwise the compiler emits generic loads.
      return static_cast<Storage*>(__cvta_global_to_generic(address));
    };
    bool aligned = true;
    Storage* gradient = base(GRADIENT, aligned);
    if (work == Work::Frozen) return zero<D>(gradient, from, to);
    Stepper<D, Op> stepper{{base(PARAMETER, aligned), gradient},
                           prepared[tensor].constants,
                           work == Work::FromZeros,
                           zero_grad,
                           {random_bits(tensor, seed) * 8},  // 8 keys apart, one for each array
                           begin};
#pragma unroll
    for (int k = 2; k < COUNT; k++) stepper.base[k] = base(STATES + k - 2, aligned);
    const int thread = threadIdx.x;
    if (aligned) {
      walk<VECTOR<D>, TILE>(
          from, to, [&](int64_t offset) { stepper.template vectors<EACH>(offset + thread * VECTOR<D>); },
          [&](int64_t offset) { stepper.template vectors<1>(offset); },
          [&](int64_t offset) { stepper.template elements<1>(offset); });
    } else {
      int64_t i = from + thread;
      for (; i + 3 * THREADS < to; i += 4 * THREADS) stepper.template elements<4>(i);
      for (; i < to; i += THREADS) stepper.template elements<1>(i);
    }
  });
}

// ---- host ----

// use(D()) with D the type of the dtype.
template <class Use>
cudaError_t with_step_dtype(int dtype, bool stochastic, Use use) {
  if (Dtype(dtype) == Dtype::BF16 && stochastic) return use(StochasticBF16());
  return with_dtype(dtype, use);
}

// use(table) with the table, which is on the host if it has at most MAX_STEP_TABLE tensors, in the smallest form that holds
// it.
template <class Use>
cudaError_t with_step_table(const StepTable& arrays, Use use) {
  auto as_parameters = [&](auto& table) {
    std::memcpy(table.rows, arrays.rows, ROWS * arrays.tensors * sizeof(int64_t));
    std::memcpy(table.tile_offsets, arrays.tile_offsets, (arrays.tensors + 1) * sizeof(uint32_t));
    return use(table);
  };
  if (arrays.tensors <= SMALL_STEP_TABLE) return as_parameters(scratch<ParameterStepTable<SMALL_STEP_TABLE>>());
  if (arrays.tensors <= MAX_STEP_TABLE) return as_parameters(scratch<ParameterStepTable<MAX_STEP_TABLE>>());
  return use(DeviceStepTable{arrays.rows, arrays.tile_offsets});
}

template <class Op, class Options>
const char* step(const StepTable& arrays, const StepDecision& decision, const Options& options) {
  return message(with_step_dtype(arrays.dtype, decision.seed >= 0, [&](auto d) {
    using D = decltype(d);
    using Wide = typename D::Wide;
    using Constants = typename Op::template Constants<Wide>;
    const uint32_t tensors = arrays.tensors;
    auto* prepared = static_cast<Prepared<Constants>*>(arrays.workspace);
    auto* rows = reinterpret_cast<int64_t*>(prepared + tensors);
    auto* tile_offsets = reinterpret_cast<uint32_t*>(rows + ROWS * tensors);
    Launch small = launch_of(arrays);
    small.tiles = (tensors + THREADS - 1) / THREADS;
    const cudaError_t error = with_step_table(arrays, [&](const auto& table) {
      using Table = std::decay_t<decltype(table)>;
      return launch(prepare_kernel<Constants, Wide, Options, Table>, small, table, decision, options, prepared, rows,
                    tile_offsets);
    });
    if (error != cudaSuccess) return error;
    Launch all = launch_of(arrays);
    all.blocks_per_sm = STEP_BLOCKS_PER_SM<D, Op>;
    const auto table = tensors <= MAX_STEP_TABLE ? DeviceStepTable{rows, tile_offsets}
                                                 : DeviceStepTable{arrays.rows, arrays.tile_offsets};
    return launch(step_kernel<D, Op>, all, table, prepared, decision.zero_grad, uint32_t(decision.seed));
  }));
}

}  // namespace

extern "C" {

int32_t fastclip_cuda_max_step_table() { return MAX_STEP_TABLE; }

int64_t fastclip_cuda_step_bytes(int64_t tensors) {
  return tensors * (sizeof(Prepared<AdamW<double>>) + ROWS * sizeof(int64_t)) + (tensors + 1) * sizeof(uint32_t);
}

int64_t fastclip_cuda_pack_step(const int64_t* rows, int64_t tensors, int32_t itemsize, int32_t states,
                                uint32_t* tile_offsets) {
  const int64_t tile = step_tile(2 + states, itemsize);
  int64_t tiles = 0;
  for (int64_t i = 0; i < tensors; i++) {
    const int64_t numel = rows[NUMEL * tensors + i];
    tile_offsets[i] = uint32_t(tiles);
    if (numel > 0) tiles += ((rows[GRADIENT * tensors + i] & 15) / itemsize + numel + tile - 1) / tile;
    if (tiles > INT32_MAX) return -1;
  }
  tile_offsets[tensors] = uint32_t(tiles);
  return tiles;
}

const char* fastclip_cuda_adamw(const StepTable* table, const StepDecision* decision, const AdamWOptions* options) {
  if (table->states == 3) return step<AdamWStep<true>>(*table, *decision, *options);
  return step<AdamWStep<false>>(*table, *decision, *options);
}

const char* fastclip_cuda_sgd(const StepTable* table, const StepDecision* decision, const SgdOptions* options) {
  if (table->states == 0) return step<SgdStep<false, false>>(*table, *decision, *options);
  if (options->nesterov) return step<SgdStep<true, true>>(*table, *decision, *options);
  return step<SgdStep<true, false>>(*table, *decision, *options);
}

}  // extern "C"

}  // namespace fastclip::cuda
