// SIMD vectors of FASTCLIP_VECTOR_BYTES bytes (GCC/Clang vector extensions), and how each dtype is loaded into them and
// stored. Included by kernels.h only, once for each instruction set.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../elementwise.h"

#if FASTCLIP_VECTOR_BYTES > 16
#if defined(__clang__) && defined(_MSC_VER)  // whose immintrin.h leaves out what the whole file is not compiled for
#define __SSE3__ 1
#define __SSSE3__ 1
#define __SSE4_1__ 1
#define __SSE4_2__ 1
#define __AVX__ 1
#define __AVX2__ 1
#define __FMA__ 1
#define __F16C__ 1
#if FASTCLIP_VECTOR_BYTES == 64
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#endif
#endif
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#define FASTCLIP_NEON 1
#elif defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#define FASTCLIP_SSE2 1
#endif

namespace fastclip::cpu::FASTCLIP_ISA {
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
FASTCLIP_FN void store(void* to, V v) {
  memcpy(to, &v, sizeof(V));
}

template <class To, class From>
FASTCLIP_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

constexpr int BYTES = FASTCLIP_VECTOR_BYTES;

#if FASTCLIP_NEON
// L elements of 16 bits, 2 or 4; and the first L of what was made of them.
template <int L>
FASTCLIP_FN uint16x4_t load_words(const void* p) {
  if constexpr (L == 4) return load<uint16x4_t>(p);
  else return vcreate_u16(load<uint32_t>(p));
}
template <int L, class V>
FASTCLIP_FN auto lower(V v) {
  if constexpr (L == 4) return v;
  else if constexpr (std::is_same_v<V, float32x4_t>) return vget_low_f32(v);
  else return vget_low_u32(v);
}
#endif

#if FASTCLIP_VECTOR_BYTES == 16 && !FASTCLIP_NEON
// L elements of 16 bits in the lower halves of int32s, and back. GCC 12 takes the general form apart.
template <int L>
FASTCLIP_FN Vec<int32_t, L> load_words(const void* p) {
#if FASTCLIP_SSE2
  if constexpr (L == 4)
    return bits_as<Vec<int32_t, 4>>(
        _mm_unpacklo_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)), _mm_setzero_si128()));
#endif
  return __builtin_convertvector(load<Vec<uint16_t, L>>(p), Vec<int32_t, L>);
}
template <int L>
FASTCLIP_FN void store_words(void* p, Vec<int32_t, L> words) {
#if FASTCLIP_SSE2
  if constexpr (L == 4) {
    const auto extended = bits_as<__m128i>(words << 16 >> 16);  // so that the saturating pack leaves them alone
    return _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packs_epi32(extended, extended));
  }
#endif
  store(p, __builtin_convertvector(words, Vec<uint16_t, L>));
}
#endif

// ---- dtypes: Bits is an integer of the stored width, Compute the type of the arithmetic ----
//
// widen and narrow: L elements, in order. widen_all and narrow_all: a register full of stored elements as PARTS registers
// of widened ones, for work where the order of the elements does not matter; narrow_all undoes what widen_all does.

// What most dtypes' widen_all and narrow_all do: one part after the other.
template <class T, class V, int PARTS>
FASTCLIP_FN void widen_in_order(const typename T::Bits* p, V (&parts)[PARTS]) {
  constexpr int L = sizeof(V) / sizeof(typename T::Compute);
#pragma GCC unroll 2
  for (int k = 0; k < PARTS; k++) parts[k] = T::template widen<L>(p + k * L);
}
template <class T, class V, int PARTS>
FASTCLIP_FN void narrow_in_order(typename T::Bits* p, const V (&parts)[PARTS]) {
  constexpr int L = sizeof(V) / sizeof(typename T::Compute);
#pragma GCC unroll 2
  for (int k = 0; k < PARTS; k++) T::template narrow<L>(p + k * L, parts[k]);
}

struct F64 {
  using Bits = int64_t;
  using Compute = double;
  static constexpr int PARTS = 1;
  template <class V> static FASTCLIP_FN void widen_all(const Bits* p, V (&parts)[1]) { widen_in_order<F64>(p, parts); }
  template <class V> static FASTCLIP_FN void narrow_all(Bits* p, const V (&parts)[1]) {
    narrow_in_order<F64>(p, parts);
  }
  template <int L> static FASTCLIP_FN Vec<double, L> widen(const Bits* p) { return load<Vec<double, L>>(p); }
  template <int L> static FASTCLIP_FN void narrow(Bits* p, Vec<double, L> v) { store(p, v); }
};

struct F32 {
  using Bits = int32_t;
  using Compute = float;
  static constexpr int PARTS = 1;
  template <class V> static FASTCLIP_FN void widen_all(const Bits* p, V (&parts)[1]) { widen_in_order<F32>(p, parts); }
  template <class V> static FASTCLIP_FN void narrow_all(Bits* p, const V (&parts)[1]) {
    narrow_in_order<F32>(p, parts);
  }
  template <int L> static FASTCLIP_FN Vec<float, L> widen(const Bits* p) { return load<Vec<float, L>>(p); }
  template <int L> static FASTCLIP_FN void narrow(Bits* p, Vec<float, L> v) { store(p, v); }
};

struct BF16 {
  using Bits = int16_t;
  using Compute = float;
  static constexpr int PARTS = 2;
  // The elements at even places and those at odd ones: two of them are 32 bits, of which one is shifted up, and the other
  // one need only be left alone. (Widened in order they would go through the one port that moves elements about.)
  template <class V> static FASTCLIP_FN void widen_all(const Bits* p, V (&parts)[2]) {
    using Pairs = Vec<uint32_t, sizeof(V) / 4>;
    const auto pairs = load<Pairs>(p);
    parts[0] = bits_as<V>(pairs << 16);
    parts[1] = bits_as<V>(pairs & 0xffff0000u);
  }
  // A NaN must be one that was a bfloat16, or have no lower bits: rounding could make another number of it.
  template <class V> static FASTCLIP_FN void narrow_all(Bits* p, const V (&parts)[2]) {
    using Pairs = Vec<uint32_t, sizeof(V) / 4>;
    const auto even = bits_as<Pairs>(parts[0]), odd = bits_as<Pairs>(parts[1]);
    store(p, ((even + 0x7fffu + ((even >> 16) & 1u)) >> 16) | ((odd + 0x7fffu + ((odd >> 16) & 1u)) & 0xffff0000u));
  }
  template <int L> static FASTCLIP_FN Vec<float, L> widen(const Bits* p) {
    using Wide = Vec<uint32_t, L>;
    Wide wide;
    // GCC 12 splits a general __builtin_convertvector into halves and quarters.
#if FASTCLIP_VECTOR_BYTES == 64
    if constexpr (L == 16) wide = bits_as<Wide>(_mm512_cvtepu16_epi32(load<__m256i>(p)));
    else wide = bits_as<Wide>(_mm256_cvtepu16_epi32(load<__m128i>(p)));
#elif FASTCLIP_VECTOR_BYTES == 32
    if constexpr (L == 8) wide = bits_as<Wide>(_mm256_cvtepu16_epi32(load<__m128i>(p)));
    else wide = bits_as<Wide>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(load<long long>(p))));
#elif FASTCLIP_NEON
    return bits_as<Vec<float, L>>(lower<L>(vshll_n_u16(load_words<L>(p), 16)));
#else
    wide = bits_as<Wide>(load_words<L>(p));
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
#elif FASTCLIP_NEON
    store(p, vmovn_u32(bits_as<uint32x4_t>(rounded)));
#else
    store_words<L>(p, bits_as<Vec<int32_t, L>>(rounded));
#endif
  }
};

#if FASTCLIP_VECTOR_BYTES == 16 && !FASTCLIP_NEON
// float16, as the bits of the lower half of an int32, to float32 and back. Whatever the number is, all that it could be is
// computed, and what it is selected.
template <int L>
FASTCLIP_FN Vec<float, L> half_to_float(Vec<int32_t, L> half) {
  const auto magnitude = half & 0x7fff, normal = (magnitude << 13) + 0x38000000;
  const auto subnormal = bits_as<Vec<int32_t, L>>(__builtin_convertvector(magnitude, Vec<float, L>) * 0x1p-24f);
  const auto inf_or_nan = (magnitude << 13) | 0x7f800000;
  const auto bits = magnitude >= 0x7c00 ? inf_or_nan : magnitude >= 0x400 ? normal : subnormal;
  return bits_as<Vec<float, L>>(bits | (half & 0x8000) << 16);
}
template <int L>
FASTCLIP_FN Vec<int32_t, L> float_to_half(Vec<float, L> f) {
  using I = Vec<int32_t, L>;
  const auto bits = bits_as<I>(f), magnitude = bits & 0x7fffffff;
  const auto normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const auto subnormal = bits_as<I>(bits_as<Vec<float, L>>(magnitude) + 0.5f) - 0x3f000000;  // rounded by the addition
  const auto nan = 0x7e00 | (magnitude >> 13 & 0x3ff);
  const auto large = magnitude > 0x7f800000 ? nan : I{} + 0x7c00;  // inf: what rounds to it, too
  return (magnitude >= 0x477ff000 ? large : magnitude >= 0x38800000 ? normal : subnormal) | (bits >> 16 & 0x8000);
}
#endif

struct F16 {
  using Bits = int16_t;
  using Compute = float;
  static constexpr int PARTS = 2;
  template <class V> static FASTCLIP_FN void widen_all(const Bits* p, V (&parts)[2]) { widen_in_order<F16>(p, parts); }
  template <class V> static FASTCLIP_FN void narrow_all(Bits* p, const V (&parts)[2]) {
    narrow_in_order<F16>(p, parts);
  }
  template <int L> static FASTCLIP_FN Vec<float, L> widen(const Bits* p) {
#if FASTCLIP_VECTOR_BYTES == 64
    if constexpr (L == 16) return bits_as<Vec<float, L>>(_mm512_cvtph_ps(load<__m256i>(p)));
    else return bits_as<Vec<float, L>>(_mm256_cvtph_ps(load<__m128i>(p)));
#elif FASTCLIP_VECTOR_BYTES == 32
    if constexpr (L == 8) return bits_as<Vec<float, L>>(_mm256_cvtph_ps(load<__m128i>(p)));
    else return bits_as<Vec<float, L>>(_mm_cvtph_ps(_mm_cvtsi64_si128(load<long long>(p))));
#elif FASTCLIP_NEON
    return bits_as<Vec<float, L>>(lower<L>(vcvt_f32_f16(vreinterpret_f16_u16(load_words<L>(p)))));
#else
    return half_to_float<L>(load_words<L>(p));
#endif
  }
  template <int L> static FASTCLIP_FN void narrow(Bits* p, Vec<float, L> v) {
#if FASTCLIP_VECTOR_BYTES == 64
    store(p, _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif FASTCLIP_VECTOR_BYTES == 32
    store(p, _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif FASTCLIP_NEON
    store(p, vcvt_f16_f32(bits_as<float32x4_t>(v)));
#else
    store_words<L>(p, float_to_half<L>(v));
#endif
  }
};

template <class T>
FASTCLIP_FN double value_of_bits(typename T::Bits bits) {
  typename T::Bits padded[BYTES] = {bits};
  return double(T::template widen<BYTES / sizeof(typename T::Compute)>(padded)[0]);
}

}  // namespace
}  // namespace fastclip::cpu::FASTCLIP_ISA
