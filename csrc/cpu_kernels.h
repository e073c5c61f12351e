// One chunk on one CPU core, written once in GCC/Clang vector extensions and compiled for several instruction sets:
// cpu_portable.cpp, cpu_avx2.cpp and cpu_avx512.cpp set FASTCLIP_ISA and FASTCLIP_VECTOR_BYTES, then include this file.
// Everything lives in a namespace of its own so that the linker never mixes two instruction sets.
//
// Squares are summed in float32 for RUN steps, then moved into a float64 total: no count of elements saturates it. Where
// squares of a chunk may have overflowed or vanished in float32, the chunk (still in cache) is summed again in float64.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu_kernels_table.h"
#include "elementwise.h"

#if FASTCLIP_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace fastclip::FASTCLIP_ISA {
namespace {

template <class T, int LANES>
struct VectorOf {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <class T, int LANES>
using Vec = typename VectorOf<T, LANES>::type;

template <class V>
FASTCLIP_FN V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
FASTCLIP_FN void store(void* to, V v) { memcpy(to, &v, sizeof(V)); }

template <class To, class From>
FASTCLIP_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

constexpr int BYTES = FASTCLIP_VECTOR_BYTES;
constexpr int RUN = 16;               // additions per float32 lane before its sum moves on to float64
constexpr double VANISHING = 1e-24;   // a chunk's float32 power sum below this may have lost more than rounding

// ---- how each dtype is stored: Bits has its width, Compute is what it is multiplied in ----

struct F64 {
  using Bits = int64_t;
  using Compute = double;
  template <int L> static FASTCLIP_FN Vec<double, L> widen(const Bits* p) { return load<Vec<double, L>>(p); }
  template <int L> static FASTCLIP_FN void narrow(Bits* p, Vec<double, L> v) { store(p, v); }
};

struct F32 {
  using Bits = int32_t;
  using Compute = float;
  template <int L> static FASTCLIP_FN Vec<float, L> widen(const Bits* p) { return load<Vec<float, L>>(p); }
  template <int L> static FASTCLIP_FN void narrow(Bits* p, Vec<float, L> v) { store(p, v); }
};

struct BF16 {
  using Bits = int16_t;
  using Compute = float;
  template <int L> static FASTCLIP_FN Vec<float, L> widen(const Bits* p) {
    using Wide = Vec<uint32_t, L>;
    Wide wide;
    // GCC 12 takes a general __builtin_convertvector apart into halves and quarters.
#if FASTCLIP_VECTOR_BYTES == 64
    if constexpr (L == 16) wide = bits_as<Wide>(_mm512_cvtepu16_epi32(load<__m256i>(p)));
    else wide = bits_as<Wide>(_mm256_cvtepu16_epi32(load<__m128i>(p)));
#elif FASTCLIP_VECTOR_BYTES == 32
    if constexpr (L == 8) wide = bits_as<Wide>(_mm256_cvtepu16_epi32(load<__m128i>(p)));
    else wide = bits_as<Wide>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(load<long long>(p))));
#else
    wide = __builtin_convertvector(load<Vec<uint16_t, L>>(p), Wide);
#endif
    return bits_as<Vec<float, L>>(wide << 16);
  }
  template <int L> static FASTCLIP_FN void narrow(Bits* p, Vec<float, L> v) {
    auto rounded = round_to_bf16(bits_as<Vec<uint32_t, L>>(v));
#if FASTCLIP_VECTOR_BYTES == 64
    store(p, _mm512_cvtepi32_epi16(bits_as<__m512i>(rounded)));
#elif FASTCLIP_VECTOR_BYTES == 32
    const __m256i words = bits_as<__m256i>(rounded);
    store(p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
    store(p, __builtin_convertvector(rounded, Vec<uint16_t, L>));
#endif
  }
};

#if FASTCLIP_VECTOR_BYTES == 16
inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu, bits;
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;                // inf, NaN
  else if (magnitude >= 0x400u) bits = (magnitude << 13) + 0x38000000u;                     // normal
  else bits = bits_as<uint32_t>(float(magnitude) * 0x1p-24f);                               // subnormal, zero
  return bits_as<float>(bits | sign);
}
inline uint16_t float_to_half(float f) {
  uint32_t bits = bits_as<uint32_t>(f), sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u | (bits >> 13 & 0x3ffu);                    // NaN
  if (bits >= 0x477ff000u) return sign | 0x7c00u;                                           // rounds to inf
  if (bits >= 0x38800000u) return sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13);
  return sign | (bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - bits_as<uint32_t>(0.5f)); // subnormal, rounded by +
}
#endif

struct F16 {
  using Bits = int16_t;
  using Compute = float;
  template <int L> static FASTCLIP_FN Vec<float, L> widen(const Bits* p) {
#if FASTCLIP_VECTOR_BYTES == 64
    if constexpr (L == 16) return bits_as<Vec<float, L>>(_mm512_cvtph_ps(load<__m256i>(p)));
    else return bits_as<Vec<float, L>>(_mm256_cvtph_ps(load<__m128i>(p)));
#elif FASTCLIP_VECTOR_BYTES == 32
    if constexpr (L == 8) return bits_as<Vec<float, L>>(_mm256_cvtph_ps(load<__m128i>(p)));
    else return bits_as<Vec<float, L>>(_mm_cvtph_ps(_mm_cvtsi64_si128(load<long long>(p))));
#else
    Vec<float, L> v;
    for (int k = 0; k < L; k++) v[k] = half_to_float(uint16_t(p[k]));
    return v;
#endif
  }
  template <int L> static FASTCLIP_FN void narrow(Bits* p, Vec<float, L> v) {
#if FASTCLIP_VECTOR_BYTES == 64
    store(p, _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif FASTCLIP_VECTOR_BYTES == 32
    store(p, _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int k = 0; k < L; k++) p[k] = Bits(float_to_half(v[k]));
#endif
  }
};

template <class T>
FASTCLIP_FN double value_of_bits(typename T::Bits bits) {
  typename T::Bits padded[BYTES] = {bits};
  return double(T::template widen<BYTES / sizeof(typename T::Compute)>(padded)[0]);
}

// ---- measure: sum |x|^p and max|x| of n elements ----

// Pairwise over the lanes, in a fixed order.
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

// Eight running sums of type Acc, a vector each, so that eight additions are in flight.
template <class T, class Acc, Norm N, bool ABSMAX>
struct Reduction {
  using Bits = typename T::Bits;
  static constexpr int LANES = BYTES / sizeof(Acc);
  using Sums = Vec<Acc, LANES>;
  using Magnitudes = Vec<Bits, LANES>;
  static constexpr Bits SIGN = Bits(Bits(1) << (8 * sizeof(Bits) - 1));

  Sums sums[8] = {};
  Vec<double, LANES> total = {};
  double slow_sum = 0;
  Magnitudes largest[8] = {};

  // LANES elements at x into the k-th sum.
  FASTCLIP_FN void step(int k, const Bits* x, double p) {
    if constexpr (N != Norm::Max) {
      const auto lanes = __builtin_convertvector(T::template widen<LANES>(x), Sums);
      if constexpr (N == Norm::Power)
        for (int i = 0; i < LANES; i++) slow_sum += power_of(lanes[i], p);
      else
        sums[k] = accumulate<N>(sums[k], lanes);
    }
    if constexpr (ABSMAX)
      largest[k] = larger(largest[k], magnitude_bits(load<Magnitudes>(x), Magnitudes{} + SIGN));
  }

  FASTCLIP_FN void end_run() {
    if constexpr (N == Norm::L2 || N == Norm::L1) {
      const Sums run = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
      total += __builtin_convertvector(run, Vec<double, LANES>);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) sums[k] = Sums{};
    }
  }

  FASTCLIP_FN Moments finish() const {
    Moments m;
    if constexpr (N == Norm::Power) m.power = slow_sum;
    else if constexpr (N != Norm::Max)
      m.power = fold<double, LANES>(total, [](double a, double b) __attribute__((always_inline)) { return a + b; });
    if constexpr (ABSMAX) {
      Magnitudes all = largest[0];
#pragma GCC unroll 8
      for (int k = 1; k < 8; k++) all = larger(all, largest[k]);
      m.absmax = value_of_bits<T>(
          fold<Bits, LANES>(all, [](Bits a, Bits b) __attribute__((always_inline)) { return larger(a, b); }));
    }
    return m;
  }
};

template <class T, class Acc, Norm N, bool ABSMAX>
FASTCLIP_FN Moments reduce(const typename T::Bits* x, int64_t n, double p) {
  using Bits = typename T::Bits;
  using R = Reduction<T, Acc, N, ABSMAX>;
  constexpr int LANES = R::LANES, BLOCK = 8 * LANES;
  constexpr int AHEAD = 1024 / sizeof(Bits);  // prefetch distance in elements
  R state;
  int64_t i = 0;
  while (i + BLOCK <= n) {
    const int64_t last = n - i < RUN * BLOCK ? n - BLOCK : i + (RUN - 1) * BLOCK;
    for (; i <= last; i += BLOCK) {
#pragma GCC unroll 8
      for (int b = 0; b < int(BLOCK * sizeof(Bits)); b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(x + i + AHEAD) + b);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) state.step(k, x + i + k * LANES, p);
    }
    state.end_run();
  }
  if (i < n) {
#pragma GCC unroll 7
    for (int k = 0; k < 7; k++) {
      if (i + LANES > n) break;
      state.step(k, x + i, p);
      i += LANES;
    }
    if (i < n) {
      Bits rest[LANES] = {};
      memcpy(rest, x + i, (n - i) * sizeof(Bits));
      state.step(7, rest, p);
    }
    state.end_run();
  }
  return state.finish();
}

template <class T, Norm N, bool ABSMAX>
Moments measure(const void* data, int64_t n, double p) {
  auto x = static_cast<const typename T::Bits*>(data);
  if constexpr (N == Norm::Power) {
    return reduce<T, double, N, ABSMAX>(x, n, p);
  } else {
    const Moments m = reduce<T, typename T::Compute, N, ABSMAX>(x, n, p);
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
    Bits rest[4 * LANES];
    for (auto& filler : rest) filler = x[i];  // a value that is there, so that the filling changes no answer
    memcpy(rest, x + i, (n - i) * sizeof(Bits));
    op(rest);
    memcpy(x + i, rest, (n - i) * sizeof(Bits));
  }
}

template <class T>
void scale(void* data, int64_t n, double coef) {
  using Bits = typename T::Bits;
  using Compute = typename T::Compute;
  constexpr int LANES = BYTES / sizeof(Compute);
  const auto c = Vec<Compute, LANES>{} + Compute(coef);
  rewrite<T>(data, n, [=](Bits* x) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
      T::template narrow<LANES>(x + k * LANES, scaled(T::template widen<LANES>(x + k * LANES), c));
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
#else
  for (int i = 0; i < L; i++) x[i] = sqrt(x[i]);
  return x;
#endif
}

// What the arrays of a step hold at one place, in the order param, grad, states.
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
  // Everything but the gradient.
  FASTCLIP_FN void store(Bits* const (&at)[COUNT], int64_t i, const StepArrays& arrays) const {
#pragma GCC unroll 5
    for (int k = 0; k < COUNT; k++) {
      if (k == 1) continue;
      if constexpr (std::is_same_v<T, BF16>) {
        if (arrays.stochastic) {
          narrow_stochastically(at[k] + i, x[k], uint32_t(arrays.first + i), arrays.key + k);
          continue;
        }
      }
      T::template narrow<L>(at[k] + i, x[k]);
    }
  }
  static FASTCLIP_FN void narrow_stochastically(Bits* to, V value, uint32_t first, uint32_t key) {
    using U = Vec<uint32_t, L>;
    U index;
    for (int i = 0; i < L; i++) index[i] = first + i;
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
  void* const all[5] = {arrays.param, const_cast<void*>(arrays.grad), arrays.state[0], arrays.state[1], arrays.state[2]};
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
    Bits rest[COUNT][L] = {};
    Bits* there[COUNT];
    for (int k = 0; k < COUNT; k++) {
      memcpy(rest[k], at[k] + i, bytes);
      there[k] = rest[k] - i;
    }
    lanes.load(there, i);
    op(lanes.x);
    lanes.store(there, i, arrays);
    for (int k = 0; k < COUNT; k++)
      if (k != 1) memcpy(at[k] + i, rest[k], bytes);
  }
}

template <class T>
void adamw(const StepArrays& arrays, const AdamW<double>& c) {
  using S = typename T::Compute;
  const AdamW<S> h{S(c.coef), S(c.decay), S(c.lerp), S(c.beta2), S(c.beta2_rest), S(c.step_size),
                   S(c.inv_root_bias2), S(c.eps)};
  constexpr int L = BYTES / sizeof(S);
  auto square_root = [](Vec<S, L> x) __attribute__((always_inline)) { return root<L>(x); };
  if (arrays.state[2]) {
    step_over<T, 5>(arrays, [=](auto (&x)[5]) __attribute__((always_inline)) {
      h.template operator()<true>(x[0], x[1], x[2], x[3], x[4], square_root);
    });
  } else {
    step_over<T, 4>(arrays, [=](auto (&x)[4]) __attribute__((always_inline)) {
      h.template operator()<false>(x[0], x[1], x[2], x[3], x[3], square_root);
    });
  }
}

template <class T>
void sgd(const StepArrays& arrays, const Sgd<double>& c, bool nesterov) {
  using S = typename T::Compute;
  const Sgd<S> h{S(c.coef), S(c.weight_decay), S(c.momentum), S(c.rest), S(c.lr)};
  if (!arrays.state[0]) {
    step_over<T, 2>(arrays, [=](auto (&x)[2]) __attribute__((always_inline)) {
      h.template operator()<false, false>(x[0], x[1], x[1]);
    });
  } else if (nesterov) {
    step_over<T, 3>(arrays, [=](auto (&x)[3]) __attribute__((always_inline)) {
      h.template operator()<true, true>(x[0], x[1], x[2]);
    });
  } else {
    step_over<T, 3>(arrays, [=](auto (&x)[3]) __attribute__((always_inline)) {
      h.template operator()<true, false>(x[0], x[1], x[2]);
    });
  }
}

template <class T>
constexpr DtypeKernels kernels_of() {
  return {
      measure<T, Norm::L2, false>, measure<T, Norm::L2, true>,    measure<T, Norm::L1, true>,
      measure<T, Norm::Max, true>, measure<T, Norm::Power, true>, scale<T>, clamp<T>, adamw<T>, sgd<T>};
}

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels = {{kernels_of<F32>(), kernels_of<F64>(), kernels_of<BF16>(), kernels_of<F16>()}};

}  // namespace fastclip::FASTCLIP_ISA
