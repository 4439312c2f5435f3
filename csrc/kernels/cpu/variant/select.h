// Selecting the k largest of a few thousand values: bisection on order-preserving integers, each step one vectorised
// count, in place of comparisons that a processor cannot predict.
#pragma once

#include <algorithm>

#include "kernels/cpu/variant/elements.h"

namespace opd::cpu::OPD_CPU_VARIANT {

template <class C>
using OrderedOf = std::conditional_t<std::is_same<C, double>::value, uint64_t, uint32_t>;

// An integer that compares as the value does; -0.0 equals +0.0. Not for NaN.
OPD_INLINE uint32_t ordered(float value) {
  const uint32_t raw = bit_cast<uint32_t>(value + 0.0f);
  return raw & 0x80000000u ? ~raw : raw | 0x80000000u;
}
OPD_INLINE uint64_t ordered(double value) {
  const uint64_t raw = bit_cast<uint64_t>(value + 0.0);
  return raw >> 63 ? ~raw : raw | uint64_t{1} << 63;
}
OPD_INLINE float value_of(uint32_t bits) { return bit_cast<float>(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits); }
OPD_INLINE double value_of(uint64_t bits) { return bit_cast<double>(bits >> 63 ? bits & ~(uint64_t{1} << 63) : ~bits); }

template <class U>
OPD_INLINE int64_t count_at_least(const U* values, int64_t count, U bound) {
  U found = 0;
  for (int64_t i = 0; i < count; ++i) found += values[i] >= bound ? 1 : 0;
  return static_cast<int64_t>(found);
}

// A bound that at least k and, but for ties with it, at most k + slack of the values reach. 1 <= k <= count.
template <class U>
U bound_of_largest(const U* values, int64_t count, int64_t k, int64_t slack) {
  U low = values[0], high = values[0];
  for (int64_t i = 1; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  for (int64_t reached = count; low < high && reached > k + slack;) {  // low: at least k reach it; high + 1: fewer
    const U middle = low + (high - low) / 2 + 1;
    const int64_t above = count_at_least(values, count, middle);
    if (above >= k) {
      low = middle;
      reached = above;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Which of some values are the k largest: those above `bound`, and the first `ties` equal to it.
template <class U>
struct Selection {
  U bound;
  int64_t ties;

  Selection(const U* values, int64_t count, int64_t k)
      : bound(bound_of_largest(values, count, k, 0)), ties(k - above(values, count)) {}
  OPD_ALWAYS_INLINE bool take(U value) {
    const bool is_tie = value == bound, taken = value > bound || (is_tie && ties > 0);
    ties -= is_tie;
    return taken;
  }

 private:
  int64_t above(const U* values, int64_t count) const {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += values[i] > bound;
    return found;
  }
};

}  // namespace opd::cpu::OPD_CPU_VARIANT
