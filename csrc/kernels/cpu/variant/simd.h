// Vectors of one instruction set, written with the compiler's vector extensions, and the exponential every pass
// rests on. Compiled once per variant inside its own namespace: no symbol may be shared between variants, or the
// linker would keep the AVX-512 copy for a processor without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define OPD_INLINE static inline __attribute__((always_inline))

namespace opd::cpu::OPD_CPU_VARIANT {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__FMA__) || defined(__aarch64__)
#define OPD_HAS_FMA 1
#else
#define OPD_HAS_FMA 0
#endif

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Vec __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vec __attribute__((vector_size(kVectorBytes)));

template <class C>
struct Traits;
template <>
struct Traits<float> {
  using Vec = FloatVec;
  using IntVec = Int32Vec;
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kMinExponent = -125.5f;     // below it 2^y is treated as 0
  static constexpr double kFloorExponent = -130.0;   // arguments are clamped here, so that none is -inf
};
template <>
struct Traits<double> {
  using Vec = DoubleVec;
  using IntVec = Int64Vec;
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMinExponent = -1021.5;
  static constexpr double kFloorExponent = -1030.0;
};

template <class C>
using VecOf = typename Traits<C>::Vec;
template <class C>
using IntVecOf = typename Traits<C>::IntVec;
template <class C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));

template <class C>
OPD_INLINE VecOf<C> splat(C value) {
  return VecOf<C>{} + value;
}

template <class C>
OPD_INLINE VecOf<C> load(const C* p) {
  VecOf<C> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class C>
OPD_INLINE void store(C* p, VecOf<C> v) {
  std::memcpy(p, &v, sizeof(v));
}

// Written out rather than left to contraction: a product used twice is not contracted, and the range reduction
// below is only exact when this really is one rounding.
#if OPD_HAS_FMA
OPD_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return (FloatVec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}
OPD_INLINE DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) {
#if defined(__AVX512F__)
  return (DoubleVec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (DoubleVec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return (DoubleVec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#endif
}
#endif

// Bit i is set where lane i of a exceeds b.
OPD_INLINE uint32_t greater_mask(FloatVec a, FloatVec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<float>; ++i) mask |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return mask;
#endif
}
OPD_INLINE uint32_t greater_mask(DoubleVec a, DoubleVec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<double>; ++i) mask |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return mask;
#endif
}

template <class C>
OPD_INLINE VecOf<C> max(VecOf<C> a, VecOf<C> b) {
  return a > b ? a : b;
}

// 2^f on |f| <= 0.5, Taylor in f ln 2: truncation below 6e-9 (float), 5e-18 (double), relative.
OPD_INLINE FloatVec exp2_fraction(FloatVec f) {
  constexpr float c1 = 0.693147180559945309f, c2 = 0.240226506959100712f, c3 = 0.0555041086648215800f,
                  c4 = 0.00961812910762847716f, c5 = 0.00133335581464284434f, c6 = 0.000154035303933816099f,
                  c7 = 0.0000152527338040598403f;
  FloatVec p = splat<float>(c7);
  p = p * f + c6;
  p = p * f + c5;
  p = p * f + c4;
  p = p * f + c3;
  p = p * f + c2;
  p = p * f + c1;
  return p * f + 1.0f;
}
// e^r on |r| <= ln(2) / 2.
OPD_INLINE DoubleVec exp_fraction(DoubleVec r) {
  DoubleVec p = splat<double>(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  return p * r + 1.0;
}

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLn2High = 6.93147180369123816490e-01;  // 33 significant bits: n * kLn2High is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;

template <class C>
OPD_INLINE VecOf<C> scale_by_power_of_two(VecOf<C> value, VecOf<C> rounded_plus_magic) {
  using IntVec = IntVecOf<C>;
  using Int = typename Traits<C>::Int;
  const VecOf<C> magic = splat<C>(Traits<C>::kRoundMagic);
  const IntVec exponent = (IntVec)rounded_plus_magic - (IntVec)magic;
  // Multiply rather than shift: << of a negative lane is undefined in C++17.
  return (VecOf<C>)((IntVec)value + exponent * (Int{1} << Traits<C>::kMantissaBits));
}

// e^x for x <= 700, 0 below -708; NaN and +inf are the caller's to exclude.
OPD_INLINE DoubleVec exp(DoubleVec x) {
  const DoubleVec clamped = max<double>(x, splat<double>(-713.0));
  const DoubleVec rounded = clamped * kLog2E + Traits<double>::kRoundMagic;
  const DoubleVec n = rounded - Traits<double>::kRoundMagic;
  const DoubleVec r = (clamped - n * kLn2High) - n * kLn2Low;
  const DoubleVec e = scale_by_power_of_two<double>(exp_fraction(r), rounded);
  return x > -708.0 ? e : DoubleVec{};
}

// e^((z - m) / t) over a row: m, t and what follows from them, once a row.
//
// (z - m) / t is never formed. With c = log2(e) / t as an unevaluated sum of two words, the fraction of (z - m) c is
// taken by one fused multiply-add, so that a small temperature costs no accuracy; for float32 logits the rounding
// error of z - m itself is carried along (kCompensated). Relative error of the result: about 1e-7 in float whatever
// the argument, where exp(x) of a rounded x is off by |x| ulp.
template <class C>
struct ExponentScale {
  C max, floor, c_high, c_low, inverse;
  double temperature, row_max;
};

template <class C>
OPD_INLINE ExponentScale<C> exponent_scale(double row_max, double temperature) {
  ExponentScale<C> s;
  const double c = std::fmin(kLog2E / temperature, 1e30);
  const double lowest = static_cast<double>(std::numeric_limits<C>::lowest());
  s.max = static_cast<C>(row_max);
  s.floor = static_cast<C>(std::fmax(row_max + std::fmax(Traits<C>::kFloorExponent / c, lowest / 2), lowest));
  s.c_high = static_cast<C>(c);
  s.c_low = static_cast<C>(c - static_cast<double>(s.c_high));
  s.inverse = static_cast<C>(1.0 / temperature);
  s.temperature = temperature;
  s.row_max = row_max;
  return s;
}

// Returns e^((z - m) / t), exactly 0 where it would underflow or z = -inf; exponent2 is its log2, clamped, so that
// a product of the two is 0 there rather than 0 x inf.
template <class C, bool kCompensated>
OPD_INLINE VecOf<C> exp_scaled(VecOf<C> z, const ExponentScale<C>& s, VecOf<C>* exponent2) {
  using Vec = VecOf<C>;
  const Vec clamped = max<C>(z, splat<C>(s.floor));
  const Vec d = clamped - s.max;
#if OPD_HAS_FMA
  const Vec c_high = splat<C>(s.c_high);
  const Vec y = d * c_high;
  const Vec rounded = y + Traits<C>::kRoundMagic;
  const Vec n = rounded - Traits<C>::kRoundMagic;
  Vec f = fma(d, c_high, -n);
  f = fma(d, splat<C>(s.c_low), f);
  if (kCompensated) {  // Knuth's two-sum: d + lost = clamped - max exactly
    const Vec back = d - clamped;
    const Vec lost = (clamped - (d - back)) + ((-s.max) - back);
    f = fma(lost, c_high, f);
  }
  Vec e;
  if constexpr (std::is_same<C, double>::value) {
    e = scale_by_power_of_two<C>(exp_fraction(f * kLn2), rounded);
  } else {
    e = scale_by_power_of_two<C>(exp2_fraction(f), rounded);
  }
#else
  static_assert(std::is_same<C, double>::value, "without fused multiply-add every pass computes in double");
  const Vec x = d / splat<C>(s.temperature);
  const Vec y = x * kLog2E;
  const Vec rounded = y + Traits<C>::kRoundMagic;
  const Vec n = rounded - Traits<C>::kRoundMagic;
  const Vec e = scale_by_power_of_two<C>(exp_fraction((x - n * kLn2High) - n * kLn2Low), rounded);
#endif
  *exponent2 = y;
  return y > Traits<C>::kMinExponent ? e : Vec{};
}

}  // namespace opd::cpu::OPD_CPU_VARIANT
