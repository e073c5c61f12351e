// The math of one element, one chunk and one norm: written once, used by every launcher in this folder.
//
// V is a scalar on CUDA and a SIMD vector on the CPU (GCC/Clang vector extensions), so only operators that both have
// are used here: + - * < > & and ?:.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTCLIP_FN __host__ __device__ __forceinline__
#else
#define FASTCLIP_FN inline __attribute__((always_inline))
#endif

namespace fastclip {

// The numbers by which a dtype crosses the C interfaces; fastclip/native/cpu_interface.py has the same.
enum class Dtype : int { F32, F64, BF16, F16 };

// Which power sum a read of the gradients accumulates. Max needs none: every read can give max|g|.
enum class Norm : int { L2, L1, Max, Power };

FASTCLIP_FN Norm norm_kind(double p) {
  return p == 2.0 ? Norm::L2 : p == 1.0 ? Norm::L1 : std::isinf(p) ? Norm::Max : Norm::Power;
}

// ---- measure ----

// A power sum in float32 below this may have lost more than rounding, since small squares vanish: it is taken again in
// float64.
constexpr double VANISHING = 1e-24;

// sum + |x|^p for p = 2 and p = 1. NaN and inf go through.
template <Norm N, class V>
FASTCLIP_FN V accumulate(V sum, V x) {
  if constexpr (N == Norm::L2) return sum + x * x;
  else return sum + (x < 0 ? -x : x);
}

// |x|^p for any other p >= 0, with 0^0 = 0: p = 0 counts the non-zero elements, NaN and inf included.
FASTCLIP_FN double power_of(double x, double p) { return x == 0 ? 0.0 : pow(fabs(x), p); }

// Sign-stripped IEEE bits, read as a signed integer, are ordered like |x|, with NaN above inf. Taking max|x| on them
// needs no floating-point compare and keeps NaN.
template <class I>
FASTCLIP_FN I magnitude_bits(I bits, I sign_mask) {
  return bits & ~sign_mask;
}

template <class I>
FASTCLIP_FN I larger(I a, I b) {
  return a > b ? a : b;
}

// max of two magnitudes, NaN winning.
FASTCLIP_FN double larger_magnitude(double a, double b) { return a != a ? a : b > a || b != b ? b : a; }

// The partial result of a norm: of a chunk, a tensor or all tensors.
struct NormPartial {
  double power = 0;   // sum |x|^p
  double absmax = 0;  // max |x|
  FASTCLIP_FN void combine(const NormPartial& other) {
    power += other.power;
    absmax = larger_magnitude(absmax, other.absmax);
  }
};

FASTCLIP_FN double finish_norm(Norm kind, double p, double power, double absmax) {
  switch (kind) {
    case Norm::L2: return sqrt(power);
    case Norm::L1: return power;
    case Norm::Max: return absmax;
    default: return p == 0 ? power : pow(power, 1.0 / p);
  }
}

// ---- decide ----

constexpr double NORM_EPS = 1e-6;

// min(1, max_norm / (norm + 1e-6)), torch.nn.utils.clip_grad_norm_'s coefficient.
// An infinite max_norm never clips, whatever the norm. An infinite norm gives -0.0: see `touch`.
FASTCLIP_FN double clip_coefficient(double norm, double max_norm) {
  if (std::isinf(max_norm)) return 1.0;
  if (std::isinf(norm)) return -0.0;
  double c = max_norm / (norm + NORM_EPS);
  return c < 1.0 || c != c ? c : 1.0;
}

// ---- apply ----

enum class Touch : int { Keep, Zero, Scale };

// What a coefficient asks for: 1 leaves the tensor alone (neither read nor written), +0 writes zeros without reading
// (a NaN cannot survive it), anything else multiplies. -0 multiplies too: torch turns an infinite norm into g * 0,
// where inf becomes NaN and the rest 0.
FASTCLIP_FN Touch touch(double coef) {
  if (coef == 1.0) return Touch::Keep;
  return coef == 0.0 && !std::signbit(coef) ? Touch::Zero : Touch::Scale;
}

template <class V, class S>
FASTCLIP_FN V scaled(V x, S coef) {
  return x * coef;
}

// x limited to [low, high]; NaN stays NaN.
template <class V>
FASTCLIP_FN V clamped(V x, V low, V high) {
  return x < low ? low : (x > high ? high : x);
}

// ---- optimizers ----

// a * b, and a * b + c. Explicit on CUDA, whose compiler would contract some products and sums to fused ones in one place
// and not in another, while an element must come out the same wherever it lies in memory.
template <class V, class S>
FASTCLIP_FN V product(V a, S b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 4) return __fmul_rn(a, b);
  else return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
template <class V, class S, class C>
FASTCLIP_FN V product_plus(V a, S b, C c) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 4) return __fmaf_rn(a, b, c);
  else return __fma_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// What AdamW's first moment m multiplies g - m by, with torch's rounding. It starts from m, and the factor is 1 - beta1; or,
// where little of m is kept, from g, and the factor is that less 1, not positive: g - m loses a small g beside a large m.
template <class S>
FASTCLIP_FN S lerp_factor(double beta1) {
  const S weight = S(1 - beta1);
  return weight < S(0.5) ? weight : weight - 1;
}

// One tensor's constants of a step of torch.optim.AdamW; S is the type it is computed in.
template <class S>
struct AdamW {
  S coef;   // the gradient is multiplied by it first; negative to maximize
  S decay;  // 1 - lr * weight_decay
  S lerp;   // lerp_factor(beta1)
  S beta2, one_minus_beta2;
  S step_size;       // lr / (1 - beta1^t)
  S inv_root_bias2;  // 1 / sqrt(1 - beta2^t)
  S eps;
  // v is the running square, `largest` (AMSGrad) the largest it was; root(x) is the square root.
  template <bool AMSGRAD, class V, class Root>
  FASTCLIP_FN void operator()(V& p, V g, V& m, V& v, V& largest, Root root) const {
    g = product(g, coef);
    m = product_plus(g - m, lerp, lerp > 0 ? m : g);
    v = product_plus(v, beta2, product(product(g, one_minus_beta2), g));  // g * g could overflow where v does not
    V square = v;
    if constexpr (AMSGRAD) square = largest = largest > v ? largest : v;
    p = product_plus(p, decay, -product(m, step_size) / product_plus(root(square), inv_root_bias2, eps));
  }
};

// The same of torch.optim.SGD.
template <class S>
struct Sgd {
  S coef, weight_decay, momentum;
  S one_minus_dampening;  // 1 in the first step, which starts without momentum
  S lr;
  template <bool MOMENTUM, bool NESTEROV, class V>
  FASTCLIP_FN void operator()(V& p, V g, V& buffer) const {
    g = product_plus(g, coef, product(p, weight_decay));
    if constexpr (MOMENTUM) {
      buffer = product_plus(buffer, momentum, product(g, one_minus_dampening));
      g = NESTEROV ? product_plus(buffer, momentum, g) : buffer;
    }
    p = product_plus(g, -lr, p);
  }
};

// 32 random bits for each index and key (C. Wellons' lowbias32). `upper_random_bits` omits the last step, which does not
// change the upper 16 bits.
template <class U>
FASTCLIP_FN U upper_random_bits(U index, uint32_t key) {
  U h = index * 0x9E3779B9u ^ key;
  h = (h ^ h >> 16) * 0x7FEB352Du;
  return (h ^ h >> 15) * 0x846CA68Bu;
}
template <class U>
FASTCLIP_FN U random_bits(U index, uint32_t key) {
  const U h = upper_random_bits(index, key);
  return h ^ h >> 16;
}

// ---- storage ----

// float32 bits rounded to bfloat16 bits, to nearest even; NaN stays a (quiet) NaN.
template <class U>
FASTCLIP_FN U round_to_bf16(U bits) {
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  U quiet = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

// The same stochastically rounded: up with the probability that keeps the mean. `noise` has 16 random bits. A NaN must be
// a quiet one, as the results of arithmetic are.
template <class U>
FASTCLIP_FN U round_to_bf16_stochastically(U bits, U noise) {
  U up = bits + noise;
  return ((bits & 0x7fffffffu) < 0x7f800000u ? up : bits) >> 16;
}

}  // namespace fastclip
