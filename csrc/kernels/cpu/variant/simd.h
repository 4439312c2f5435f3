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

#define OPD_ALWAYS_INLINE inline __attribute__((always_inline))
#define OPD_INLINE static OPD_ALWAYS_INLINE

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
typedef uint32_t UInt32Vec __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UInt64Vec __attribute__((vector_size(kVectorBytes)));

template <class C>
struct Traits;
template <>
struct Traits<float> {
  using Vec = FloatVec;
  using UIntVec = UInt32Vec;
  static constexpr int kMantissaBits = 23;
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kMinExponent = -125.5f;     // below it 2^y is treated as 0
  static constexpr double kFloorExponent = -130.0;   // arguments are clamped here, so that none is -inf
};
template <>
struct Traits<double> {
  using Vec = DoubleVec;
  using UIntVec = UInt64Vec;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMinExponent = -1021.5;
  static constexpr double kFloorExponent = -1030.0;
};

template <class C>
using VecOf = typename Traits<C>::Vec;
template <class C>
using UIntVecOf = typename Traits<C>::UIntVec;
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

// b where either is NaN. Written out: of `a > b ? a : b` on a value that was just computed the compiler makes a
// comparison and a second, masked computation, six cycles of latency in place of one.
template <class C>
OPD_INLINE VecOf<C> max(VecOf<C> a, VecOf<C> b) {
#if defined(__x86_64__)
  if constexpr (std::is_same<C, float>::value) {
#if defined(__AVX512F__)
    return (VecOf<C>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VecOf<C>)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return (VecOf<C>)_mm_max_ps((__m128)a, (__m128)b);
#endif
  } else {
#if defined(__AVX512F__)
    return (VecOf<C>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
    return (VecOf<C>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    return (VecOf<C>)_mm_max_pd((__m128d)a, (__m128d)b);
#endif
  }
#else
  return a > b ? a : b;
#endif
}

// 2^f on |f| <= 0.503: 1 + f p(f), the polynomial of least relative error, 2.7e-9.
OPD_INLINE FloatVec exp2_fraction(FloatVec f) {
  FloatVec p = splat<float>(1.559710431e-4f);
  p = p * f + 1.3407566e-3f;
  p = p * f + 9.617681866e-3f;
  p = p * f + 5.5503080004e-2f;
  p = p * f + 0.24022652863f;
  p = p * f + 0.69314721629f;
  return p * f + 1.0f;
}
// The same to 3.7e-06, for results that are rounded to 11 bits or fewer.
OPD_INLINE FloatVec exp2_fraction_rough(FloatVec f) {
  FloatVec p = splat<float>(0.009785046618f);
  p = p * f + 0.05598297161f;
  p = p * f + 0.2402066076f;
  p = p * f + 0.6931127335f;
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

// value 2^n of n + kRoundMagic: the magic number's own bits leave on the left.
template <class C>
OPD_INLINE VecOf<C> scale_by_power_of_two(VecOf<C> value, VecOf<C> rounded_plus_magic) {
  using UIntVec = UIntVecOf<C>;
  return (VecOf<C>)((UIntVec)value + ((UIntVec)rounded_plus_magic << Traits<C>::kMantissaBits));
}

// e^x for x <= 700, 0 below -708; NaN and +inf are the caller's to exclude.
OPD_INLINE DoubleVec exp(DoubleVec x) {
  const DoubleVec clamped = max<double>(splat<double>(-713.0), x);
  const DoubleVec rounded = clamped * kLog2E + Traits<double>::kRoundMagic;
  const DoubleVec n = rounded - Traits<double>::kRoundMagic;
  const DoubleVec r = (clamped - n * kLn2High) - n * kLn2Low;
  const DoubleVec e = scale_by_power_of_two<double>(exp_fraction(r), rounded);
  return x > -708.0 ? e : DoubleVec{};
}

// e^((z - m) / t) over a row: m, t and what follows from them, once a row or chunk.
//
// (z - m) / t is never formed. With c = log2(e) / t as an unevaluated sum of two words, the fraction of (z - m) c is
// taken by fused multiply-adds, so that a small temperature costs no accuracy. Where z - m may round (kOffset), the
// fractions of z c and of m c are taken apart, each by one rounding, and subtracted: at z = m that is exactly 0.
// Relative error of the result: about 1e-7 in float whatever the argument, where exp(x) of a rounded x is off by |x|
// ulp.
template <class C>
struct ExponentScale {
  C max, floor, c_high, c_low, inverse;
  C max_magic, max_fraction;  // kOffset: the magic number less round(m c), and m c - round(m c)
  bool is_offset_small;       // else |m c| is so large that z - m is exact wherever e^(...) is not 0
  bool is_floor_zero;         // else m is so near the lowest finite value that -inf, clamped, would count as that does
  double temperature, row_max;
};

template <class C>
OPD_INLINE ExponentScale<C> exponent_scale(double row_max, double temperature) {
  ExponentScale<C> s;
  const double c = std::fmin(kLog2E / temperature, 1e30);
  const double lowest = static_cast<double>(std::numeric_limits<C>::lowest());
  const double floor = std::fmax(row_max + std::fmax(Traits<C>::kFloorExponent / c, lowest / 2), lowest);
  s.max = static_cast<C>(row_max);
  s.floor = static_cast<C>(floor);
  // Rounded down: rounded up it could be m itself, and a logit of -inf would count as much as the largest.
  if (static_cast<double>(s.floor) > floor || s.floor == s.max) {
    s.floor = std::nextafter(s.floor, -std::numeric_limits<C>::max());
  }
  s.c_high = static_cast<C>(c);
  s.c_low = static_cast<C>(c - static_cast<double>(s.c_high));
  s.inverse = static_cast<C>(1.0 / temperature);
  const double offset = row_max * static_cast<double>(s.c_high);
  s.is_offset_small = std::fabs(offset) < 1 << 21;
  const double rounded = s.is_offset_small ? std::nearbyint(offset) : 0;
  s.max_magic = static_cast<C>(static_cast<double>(Traits<C>::kRoundMagic) - rounded);
  s.max_fraction = static_cast<C>(offset - rounded);
  s.is_floor_zero = (static_cast<double>(s.floor) - row_max) * c < static_cast<double>(Traits<C>::kMinExponent);
  s.temperature = temperature;
  s.row_max = row_max;
  return s;
}

// Returns e^((z - m) / t), exactly 0 where it would underflow or (with is_floor_zero) z = -inf; exponent2 is its log2,
// clamped, so that a product of the two is 0 there rather than 0 x inf. A NaN shows in exponent2.
template <class C, bool kOffset>
OPD_INLINE VecOf<C> exp_scaled(VecOf<C> z, const ExponentScale<C>& s, VecOf<C>* exponent2) {
  using Vec = VecOf<C>;
  const Vec clamped = max<C>(splat<C>(s.floor), z);
  const Vec d = clamped - s.max;
#if OPD_HAS_FMA
  const Vec c_high = splat<C>(s.c_high);
  const Vec y = d * c_high;
  const Vec rounded = y + Traits<C>::kRoundMagic;
  Vec f;
  if (kOffset) {
    f = fma(clamped, c_high, -(rounded - s.max_magic)) - s.max_fraction;
  } else {
    f = fma(d, c_high, -(rounded - Traits<C>::kRoundMagic));
  }
  f = fma(d, splat<C>(s.c_low), f);
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

#if OPD_HAS_FMA
// The same to 1e-5, for results that are rounded to 11 bits or fewer.
OPD_INLINE FloatVec exp_scaled_rough(FloatVec z, const ExponentScale<float>& s, FloatVec* exponent2) {
  const FloatVec d = max<float>(splat<float>(s.floor), z) - s.max, c = splat<float>(s.c_high);
  const FloatVec y = d * c, rounded = y + Traits<float>::kRoundMagic;
  const FloatVec f = fma(d, c, -(rounded - Traits<float>::kRoundMagic));
  const FloatVec e = scale_by_power_of_two<float>(exp2_fraction_rough(f), rounded);
  *exponent2 = y;
  return y > Traits<float>::kMinExponent ? e : FloatVec{};
}
#endif

// Sums of vectors of the compute type, lane by lane in double.
template <class C>
struct LaneSums {
  static constexpr int kParts = std::is_same<C, double>::value ? 1 : 2;
  DoubleVec parts[kParts] = {};

  OPD_ALWAYS_INLINE void add(VecOf<C> v) {
    if constexpr (std::is_same<C, double>::value) {
      parts[0] += v;
    } else {
      typedef float HalfVec __attribute__((vector_size(kVectorBytes / 2)));
      HalfVec halves[2];
      std::memcpy(halves, &v, sizeof(v));
      parts[0] += __builtin_convertvector(halves[0], DoubleVec);
      parts[1] += __builtin_convertvector(halves[1], DoubleVec);
    }
  }
  OPD_ALWAYS_INLINE double total() const {
    double sum = 0;
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kLanes<double>; ++lane) sum += parts[part][lane];
    }
    return sum;
  }
};

}  // namespace opd::cpu::OPD_CPU_VARIANT
