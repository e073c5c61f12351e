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

// ---- dtypes: Bits is an integer of the stored width, Compute the type of the arithmetic ----

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
#elif FASTCLIP_NEON
    store(p, vmovn_u32(bits_as<uint32x4_t>(rounded)));
#else
    store(p, __builtin_convertvector(rounded, Vec<uint16_t, L>));
#endif
  }
};

#if FASTCLIP_VECTOR_BYTES == 16 && !FASTCLIP_NEON
inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu, bits;
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;  // inf, NaN
  else if (magnitude >= 0x400u) bits = (magnitude << 13) + 0x38000000u;       // normal
  else bits = bits_as<uint32_t>(float(magnitude) * 0x1p-24f);                 // subnormal, zero
  return bits_as<float>(bits | sign);
}
inline uint16_t float_to_half(float f) {
  uint32_t bits = bits_as<uint32_t>(f), sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u | (bits >> 13 & 0x3ffu);  // NaN
  if (bits >= 0x477ff000u) return sign | 0x7c00u;                         // rounds to inf
  if (bits >= 0x38800000u) return sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13);
  return sign | (bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - bits_as<uint32_t>(0.5f));  // subnormal, rounded by +
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
#elif FASTCLIP_NEON
    return bits_as<Vec<float, L>>(lower<L>(vcvt_f32_f16(vreinterpret_f16_u16(load_words<L>(p)))));
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
#elif FASTCLIP_NEON
    store(p, vcvt_f16_f32(bits_as<float32x4_t>(v)));
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

}  // namespace
}  // namespace fastclip::cpu::FASTCLIP_ISA
