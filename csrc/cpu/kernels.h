// The kernels of one chunk on one core, written once and compiled for several instruction sets: portable.cpp, avx2.cpp and
// avx512.cpp define FASTCLIP_ISA and FASTCLIP_VECTOR_BYTES, then include this file. Each has a namespace of its own, so
// that the linker never mixes two instruction sets.
//
// Squares are summed in float32 for RUN steps, then added to a float64 total: no number of elements saturates it. Where
// squares of a chunk may have overflowed or vanished in float32, the chunk (still in cache) is summed again in float64.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../elementwise.h"
#include "kernels_table.h"
#include "simd.h"

namespace fastclip::cpu::FASTCLIP_ISA {
namespace {

constexpr int RUN = 16;  // additions per float32 lane before its sum moves on to float64

// ---- measure: sum |x|^p and max|x| of n elements ----

// Reduces the lanes pairwise, in a fixed order.
template <class S, int LANES, class Op>
FASTCLIP_FN S fold(Vec<S, LANES> v, Op op) {
  S lanes[LANES];
  memcpy(lanes, &v, sizeof(v));
#pragma GCC unroll 8
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 32
    for (int i = 0; i < half; i++) lanes[i] = op(lanes[i], lanes[i + half]);
  return lanes[0];
}

// Eight running sums of type Acc, a vector each, so that eight additions are in flight; two maxima are enough, since the
// larger of two integers is known after one cycle. With eight, 16 registers would not hold all that a step needs.
template <class T, class Acc, Norm N, bool ABSMAX>
struct Reduction {
  using Bits = typename T::Bits;
  static constexpr int SUMS = 8, MAXIMA = 2;
  static constexpr int LANES = BYTES / sizeof(Acc);
  // A register of stored elements at a time, widened in any order; or, where sums are wider than that, one of sums.
  static constexpr bool ALL = std::is_same_v<Acc, typename T::Compute> && N != Norm::Power;
  static constexpr int PARTS = ALL ? T::PARTS : 1;
  static constexpr int WIDTH = PARTS * LANES;  // elements of a step
  static constexpr int STEPS = SUMS / PARTS;   // of a block, which adds once to each sum
  using Sums = Vec<Acc, LANES>;
  using Magnitudes = Vec<Bits, WIDTH>;
  static constexpr Bits SIGN = Bits(Bits(1) << (8 * sizeof(Bits) - 1));

  Sums sums[SUMS] = {};
  Vec<double, LANES> total = {};
  double slow_sum = 0;
  Magnitudes largest[MAXIMA] = {};

  // Adds WIDTH elements at x, the k-th of a block.
  FASTCLIP_FN void step(int k, const Bits* x, double p) {
    if constexpr (ALL && N != Norm::Max) {
      Sums parts[PARTS];
      T::widen_all(x, parts);
#pragma GCC unroll 2
      for (int j = 0; j < PARTS; j++) {
        Sums& sum = sums[k * PARTS + j];
        sum = accumulate<N>(sum, parts[j]);
      }
    } else if constexpr (N != Norm::Max) {
      const auto lanes = __builtin_convertvector(T::template widen<LANES>(x), Sums);
      if constexpr (N == Norm::Power)
        for (int i = 0; i < LANES; i++) slow_sum += power_of(lanes[i], p);
      else sums[k] = accumulate<N>(sums[k], lanes);
    }
    if constexpr (ABSMAX) {
      Magnitudes& most = largest[k % MAXIMA];
      most = larger(most, magnitude_bits(load<Magnitudes>(x), Magnitudes{} + SIGN));
    }
  }

  FASTCLIP_FN void end_run() {
    if constexpr (N == Norm::L2 || N == Norm::L1) {
      const Sums run = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
      total += __builtin_convertvector(run, Vec<double, LANES>);
#pragma GCC unroll 8
      for (int k = 0; k < SUMS; k++) sums[k] = Sums{};
    }
  }

  FASTCLIP_FN NormPartial finish() const {
    NormPartial m;
    if constexpr (N == Norm::Power) m.power = slow_sum;
    else if constexpr (N != Norm::Max)
      m.power = fold<double, LANES>(total, [](double a, double b) __attribute__((always_inline)) { return a + b; });
    if constexpr (ABSMAX) {
      m.absmax = value_of_bits<T>(fold<Bits, WIDTH>(
          larger(largest[0], largest[1]), [](Bits a, Bits b) __attribute__((always_inline)) { return larger(a, b); }));
    }
    return m;
  }
};

template <class T, class Acc, Norm N, bool ABSMAX>
FASTCLIP_FN NormPartial reduce(const typename T::Bits* x, int64_t n, double p) {
  using Bits = typename T::Bits;
  using R = Reduction<T, Acc, N, ABSMAX>;
  constexpr int WIDTH = R::WIDTH, STEPS = R::STEPS, BLOCK = STEPS * WIDTH;
  R state;
  int64_t i = 0;
  while (i + BLOCK <= n) {
    const int64_t last = n - i < RUN * BLOCK ? n - BLOCK : i + (RUN - 1) * BLOCK;
    for (; i <= last; i += BLOCK) {
#pragma GCC unroll 8
      for (int k = 0; k < STEPS; k++) state.step(k, x + i + k * WIDTH, p);
    }
    state.end_run();
  }
  if (i < n) {
#pragma GCC unroll 7
    for (int k = 0; k < STEPS - 1; k++) {
      if (i + WIDTH > n) break;
      state.step(k, x + i, p);
      i += WIDTH;
    }
    if (i < n) {
      Bits tail[WIDTH] = {};
      memcpy(tail, x + i, (n - i) * sizeof(Bits));
      state.step(STEPS - 1, tail, p);
    }
    state.end_run();
  }
  return state.finish();
}

template <class T, Norm N, bool ABSMAX>
NormPartial measure(const void* data, int64_t n, double p) {
  auto x = static_cast<const typename T::Bits*>(data);
  if constexpr (N == Norm::Power) {
    return reduce<T, double, N, ABSMAX>(x, n, p);
  } else {
    const NormPartial m = reduce<T, typename T::Compute, N, ABSMAX>(x, n, p);
    if (N == Norm::Max || sizeof(typename T::Compute) == sizeof(double)) return m;
    if (m.power >= VANISHING && m.power < HUGE_VAL) return m;
    return reduce<T, double, N, ABSMAX>(x, n, p);
  }
}

// ---- scale and clamp: n elements in place ----

template <class T, class Op>
FASTCLIP_FN void rewrite(void* data, int64_t n, Op op) {
  using Bits = typename T::Bits;
  constexpr int LANES = BYTES / sizeof(typename T::Compute);
  auto x = static_cast<Bits*>(data);
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) op(x + i);
  if (i < n) {
    Bits tail[4 * LANES];
    for (auto& padding : tail) padding = x[i];  // one of the elements, so that padding does not change what op returns
    memcpy(tail, x + i, (n - i) * sizeof(Bits));
    op(tail);
    memcpy(x + i, tail, (n - i) * sizeof(Bits));
  }
}

template <class T>
void scale(void* data, int64_t n, double coef) {
  using Bits = typename T::Bits;
  using Compute = typename T::Compute;
  constexpr int LANES = BYTES / sizeof(Compute);
  // No other NaN: see BF16::narrow_all.
  const auto c = Vec<Compute, LANES>{} + (coef == coef ? Compute(coef) : Compute(NAN));
  rewrite<T>(data, n, [=](Bits* x) __attribute__((always_inline)) {
    constexpr int PARTS = T::PARTS;
#pragma GCC unroll 4
    for (int k = 0; k < 4; k += PARTS) {
      Vec<Compute, LANES> parts[PARTS];
      T::widen_all(x + k * LANES, parts);
#pragma GCC unroll 2
      for (auto& part : parts) part = scaled(part, c);
      T::narrow_all(x + k * LANES, parts);
    }
  });
}

// Writes only where an element lies outside [low, high]; returns whether any did.
template <class T>
bool clamp(void* data, int64_t n, double low, double high) {
  using Bits = typename T::Bits;
  using Compute = typename T::Compute;
  constexpr int LANES = BYTES / sizeof(Compute);
  using V = Vec<Compute, LANES>;
  const V lo = V{} + Compute(low), hi = V{} + Compute(high);
  bool written = false;
  rewrite<T>(data, n, [&](Bits* x) __attribute__((always_inline)) {
    auto outside = lo > hi;
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      V v = T::template widen<LANES>(x + k * LANES);
      outside |= (v < lo) | (v > hi);
    }
    auto words = bits_as<Vec<int64_t, BYTES / 8>>(outside);
    int64_t any = 0;
    for (int i = 0; i < BYTES / 8; i++) any |= words[i];
    if (!any) return;
    written = true;
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
      T::template narrow<LANES>(x + k * LANES, clamped(T::template widen<LANES>(x + k * LANES), lo, hi));
  });
  return written;
}

// ---- optimizer steps: all arrays read once and written once ----

template <int L>
FASTCLIP_FN Vec<float, L> root(Vec<float, L> x) {
#if FASTCLIP_VECTOR_BYTES == 64
  return bits_as<Vec<float, L>>(_mm512_sqrt_ps(bits_as<__m512>(x)));
#elif FASTCLIP_VECTOR_BYTES == 32
  return bits_as<Vec<float, L>>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#elif FASTCLIP_NEON
  return bits_as<Vec<float, L>>(vsqrtq_f32(bits_as<float32x4_t>(x)));
#else
  for (int i = 0; i < L; i++) x[i] = sqrtf(x[i]);
  return x;
#endif
}
template <int L>
FASTCLIP_FN Vec<double, L> root(Vec<double, L> x) {
#if FASTCLIP_VECTOR_BYTES == 64
  return bits_as<Vec<double, L>>(_mm512_sqrt_pd(bits_as<__m512d>(x)));
#elif FASTCLIP_VECTOR_BYTES == 32
  return bits_as<Vec<double, L>>(_mm256_sqrt_pd(bits_as<__m256d>(x)));
#elif FASTCLIP_NEON
  return bits_as<Vec<double, L>>(vsqrtq_f64(bits_as<float64x2_t>(x)));
#else
  for (int i = 0; i < L; i++) x[i] = sqrt(x[i]);
  return x;
#endif
}

// One vector of each array of a step, in the order param, grad, states.
template <class T, int COUNT>
struct Lanes {
  using Bits = typename T::Bits;
  using Compute = typename T::Compute;
  static constexpr int L = BYTES / sizeof(Compute);
  using V = Vec<Compute, L>;
  V x[COUNT];

  FASTCLIP_FN void load(Bits* const (&at)[COUNT], int64_t i) {
#pragma GCC unroll 5
    for (int k = 0; k < COUNT; k++) x[k] = T::template widen<L>(at[k] + i);
  }
  // Stores everything but the gradient.
  FASTCLIP_FN void store(Bits* const (&at)[COUNT], int64_t i, const StepArrays& arrays) const {
#pragma GCC unroll 5
    for (int k = 0; k < COUNT; k++) {
      if (k == 1) continue;
      if constexpr (std::is_same_v<T, BF16>) {
        if (arrays.stochastic) {
          narrow_stochastically(at[k] + i, x[k], uint32_t(arrays.offset + i), arrays.key + k);
          continue;
        }
      }
      T::template narrow<L>(at[k] + i, x[k]);
    }
  }
  static FASTCLIP_FN void narrow_stochastically(Bits* to, V value, uint32_t offset, uint32_t key) {
    using U = Vec<uint32_t, L>;
    U index;
    for (int i = 0; i < L; i++) index[i] = offset + i;
    const U noise = random_bits(index, key) >> 16;
    const U rounded = round_to_bf16_stochastically(bits_as<U>(value), noise);
    for (int i = 0; i < L; i++) to[i] = Bits(rounded[i]);
  }
};

// op(lanes) for all elements of the arrays.
template <class T, int COUNT, class Op>
FASTCLIP_FN void step_over(const StepArrays& arrays, Op op) {
  using Bits = typename T::Bits;
  constexpr int L = Lanes<T, COUNT>::L;
  void* const all[5] = {arrays.param, const_cast<void*>(arrays.grad), arrays.state[0], arrays.state[1],
                        arrays.state[2]};
  Bits* at[COUNT];
  for (int k = 0; k < COUNT; k++) at[k] = static_cast<Bits*>(all[k]);
  Lanes<T, COUNT> lanes;
  int64_t i = 0;
  for (; i + L <= arrays.n; i += L) {
    lanes.load(at, i);
    op(lanes.x);
    lanes.store(at, i, arrays);
  }
  if (i < arrays.n) {
    const size_t bytes = (arrays.n - i) * sizeof(Bits);
    Bits tail[COUNT][L] = {};
    Bits* tail_at[COUNT];  // so that tail_at[k] + i is the tail
    for (int k = 0; k < COUNT; k++) {
      memcpy(tail[k], at[k] + i, bytes);
      tail_at[k] = tail[k] - i;
    }
    lanes.load(tail_at, i);
    op(lanes.x);
    lanes.store(tail_at, i, arrays);
    for (int k = 0; k < COUNT; k++)
      if (k != 1) memcpy(at[k] + i, tail[k], bytes);
  }
}

template <class T>
void adamw(const StepArrays& arrays, const AdamW<double>& c) {
  using S = typename T::Compute;
  const AdamW<S> h{S(c.coef),      S(c.decay),          S(c.lerp), S(c.beta2), S(c.one_minus_beta2),
                   S(c.step_size), S(c.inv_root_bias2), S(c.eps)};
  constexpr int L = BYTES / sizeof(S);
  auto square_root = [](Vec<S, L> x) __attribute__((always_inline)) { return root<L>(x); };
  if (arrays.state[2]) {
    step_over<T, 5>(arrays, [=](auto(&x)[5]) __attribute__((always_inline)) {
      h.template operator()<true>(x[0], x[1], x[2], x[3], x[4], square_root);
    });
  } else {
    step_over<T, 4>(arrays, [=](auto(&x)[4]) __attribute__((always_inline)) {
      h.template operator()<false>(x[0], x[1], x[2], x[3], x[3], square_root);
    });
  }
}

template <class T>
void sgd(const StepArrays& arrays, const Sgd<double>& c, bool nesterov) {
  using S = typename T::Compute;
  const Sgd<S> h{S(c.coef), S(c.weight_decay), S(c.momentum), S(c.one_minus_dampening), S(c.lr)};
  if (!arrays.state[0]) {
    step_over<T, 2>(arrays, [=](auto(&x)[2]) __attribute__((always_inline)) {
      h.template operator()<false, false>(x[0], x[1], x[1]);
    });
  } else if (nesterov) {
    step_over<T, 3>(arrays, [=](auto(&x)[3]) __attribute__((always_inline)) {
      h.template operator()<true, true>(x[0], x[1], x[2]);
    });
  } else {
    step_over<T, 3>(arrays, [=](auto(&x)[3]) __attribute__((always_inline)) {
      h.template operator()<true, false>(x[0], x[1], x[2]);
    });
  }
}

template <class T>
constexpr DtypeKernels kernels_of() {
  return {measure<T, Norm::L2, false>,
          measure<T, Norm::L2, true>,
          measure<T, Norm::L1, true>,
          measure<T, Norm::Max, true>,
          measure<T, Norm::Power, true>,
          scale<T>,
          clamp<T>,
          adamw<T>,
          sgd<T>};
}

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels = {{kernels_of<F32>(), kernels_of<F64>(), kernels_of<BF16>(), kernels_of<F16>()}};

}  // namespace fastclip::cpu::FASTCLIP_ISA
