// Logits' element types: widening a chunk into an L1-resident buffer of the compute type, and rounding back.
#pragma once

#include "kernels/cpu/variant/simd.h"
#include "kernels/params.h"

namespace opd::cpu::OPD_CPU_VARIANT {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// float for float and half logits where there is a fused multiply-add, else double: see exp_scaled.
template <class Scalar>
using ComputeOf = std::conditional_t<std::is_same<Scalar, double>::value || !OPD_HAS_FMA, double, float>;
template <class Scalar>
using ScoreOf = std::conditional_t<std::is_same<Scalar, double>::value, double, float>;
// Half logits differ by few bits: z - m is exact (or as good as) in float already.
template <class Scalar>
constexpr bool kCompensated = std::is_same<Scalar, float>::value && std::is_same<ComputeOf<Scalar>, float>::value;

template <class To, class From>
OPD_INLINE To bit_cast(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "same size");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

OPD_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
OPD_INLINE float to_float(float x) { return x; }
OPD_INLINE double to_float(double x) { return x; }
OPD_INLINE float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  float value = bit_cast<float>(magnitude) * 5.192296858534828e33f;                // 2^112 rebias, subnormals included
  if (magnitude >= 0x0f800000u) value = bit_cast<float>(magnitude | 0x7f800000u);  // inf and NaN
  return bit_cast<float>(bit_cast<uint32_t>(value) | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

// Round to nearest even; NaN stays NaN.
template <class Scalar, class C>
OPD_INLINE Scalar round_to(C value) {
  if constexpr (std::is_same<Scalar, BFloat16>::value) {
    const float f = static_cast<float>(value);
    const uint32_t bits = bit_cast<uint32_t>(f);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(f != f ? (bits >> 16) | 0x40u : rounded)};
  } else if constexpr (std::is_same<Scalar, Float16>::value) {
#if defined(__F16C__)
    return {static_cast<uint16_t>(_cvtss_sh(static_cast<float>(value), 0))};
#else
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or beyond
    if (magnitude < 0x38800000u) {  // subnormal half: let the float adder round at 2^-24
      const float shifted = bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rebased = magnitude - 0x38000000u;
    return {static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13))};
#endif
  } else {
    return static_cast<Scalar>(value);
  }
}

// A chunk lives in L1: 16 KiB of the compute type, a whole number of the groups that passes work in.
template <class C>
constexpr int64_t kChunk = 16384 / static_cast<int64_t>(sizeof(C));
template <class C>
constexpr int64_t kGroup = 8 * kLanes<C>;

template <class C>
OPD_INLINE int64_t round_up_to_group(int64_t count) {
  return (count + kGroup<C> - 1) / kGroup<C> * kGroup<C>;
}

// buffer[0, count) = source; the rest of the last group is -inf, which every pass ignores.
template <class Scalar, class C>
OPD_INLINE void widen(const Scalar* source, int64_t count, C* buffer) {
  int64_t i = 0;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
  if constexpr (std::is_same<Scalar, Float16>::value && std::is_same<C, float>::value) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
    }
  }
#endif
  for (; i < count; ++i) buffer[i] = static_cast<C>(to_float(source[i]));
  const int64_t end = round_up_to_group<C>(count);
  for (i = count; i < end; ++i) buffer[i] = -std::numeric_limits<C>::infinity();
}

// A chunk of the compute type: the logits themselves where they are that and fill whole groups, else widened.
template <class Scalar, class C>
OPD_INLINE const C* chunk_of(const Scalar* source, int64_t count, C* buffer) {
  if constexpr (std::is_same<Scalar, C>::value) {
    if (count % kGroup<C> == 0) return source;
  }
  widen(source, count, buffer);
  return buffer;
}

template <class Scalar, class C>
OPD_INLINE void narrow(const C* buffer, int64_t count, Scalar* target) {
  int64_t i = 0;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
  if constexpr (std::is_same<Scalar, Float16>::value && std::is_same<C, float>::value) {
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), 0));
    }
  }
#endif
  for (; i < count; ++i) target[i] = round_to<Scalar>(buffer[i]);
}

// Half-precision types that are widened to float and rounded back in registers.
template <class Scalar>
constexpr bool kInRegisters = std::is_same<ComputeOf<Scalar>, float>::value &&
#if defined(__F16C__)
                              (std::is_same<Scalar, BFloat16>::value || std::is_same<Scalar, Float16>::value);
#else
                              std::is_same<Scalar, BFloat16>::value;
#endif

// 2 kLanes<float> consecutive elements are a pair of vectors, in an order of the type's own: sums and maxima do not ask
// for another, and store_pair knows it. bfloat16: the even ones, then the odd, no shuffle between (little-endian).
OPD_INLINE FloatVec load_half(const BFloat16* pair, int which) {
  UInt32Vec bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return (FloatVec)(which == 0 ? bits << 16 : bits & 0xffff0000u);
}
// Rounded to nearest even; there is no NaN.
OPD_INLINE void store_pair(BFloat16* pair, FloatVec even, FloatVec odd) {
  const UInt32Vec a = (UInt32Vec)even + 0x7fffu + (((UInt32Vec)even >> 16) & 1u);
  const UInt32Vec b = (UInt32Vec)odd + 0x7fffu + (((UInt32Vec)odd >> 16) & 1u);
  const UInt32Vec bits = (a >> 16) | (b & 0xffff0000u);
  std::memcpy(pair, &bits, sizeof(bits));
}
#if defined(__F16C__)
OPD_INLINE FloatVec load_half(const Float16* pair, int which) {
  const Float16* source = pair + which * kLanes<float>;
#if defined(__AVX512F__)
  return (FloatVec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#else
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#endif
}
OPD_INLINE void store_pair(Float16* pair, FloatVec first, FloatVec second) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(pair), _mm512_maskz_cvtps_ph(0xffff, (__m512)first, 0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(pair + 16), _mm512_maskz_cvtps_ph(0xffff, (__m512)second, 0));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(pair), _mm256_cvtps_ph((__m256)first, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(pair + 8), _mm256_cvtps_ph((__m256)second, 0));
#endif
}
#endif

template <class Scalar>
OPD_INLINE Scalar* row_pointer(const LogitsView& logits, int64_t row) {
  return static_cast<Scalar*>(logits.data) + row_offset(logits, row);
}

// Calls body(Scalar{}) with the element type of `dtype`.
template <class Body>
OPD_INLINE void with_scalar(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

}  // namespace opd::cpu::OPD_CPU_VARIANT
