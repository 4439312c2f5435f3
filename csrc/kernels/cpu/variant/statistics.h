// Online statistics of a row, chunk by chunk: maximum m, s = sum e^((z-m)/t), w = sum e^((z-m)/t) (z-m)/t.
// Inside a chunk sums run in the compute type over at most 8 terms a lane, then in double: a row of 150,000 equal
// terms loses no digit. docs/math.md (5).
#pragma once

#include "kernels/cpu/variant/elements.h"

namespace opd::cpu::OPD_CPU_VARIANT {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Statistics {
  double max = -kInf, sum = 0, lost = 0,
         weighted = 0;    // sum + lost: compensated, or float64 rows lose digits by k and V
  bool poisoned = false;  // a NaN or +inf was seen: the whole row is NaN

  void add_to_sum(double value) {
    const double grown = sum + value, back = grown - sum;
    lost += (sum - (grown - back)) + (value - back);
    sum = grown;
  }
  void raise_max(double value, double temperature) {
    if (!(value > max)) return;
    if (max > -kInf) {
      const double gap = (max - value) / temperature;
      const double factor = std::exp(gap);
      weighted = factor == 0 ? 0 : factor * (weighted + gap * sum);
      sum *= factor;
      lost *= factor;
    }
    max = value;
  }
  void add_logit(double z, double temperature) {
    if (!(z < kInf)) {
      poisoned = true;
    } else if (z > -kInf) {
      raise_max(z, temperature);
      const double gap = (z - max) / temperature;
      const double e = std::exp(gap);
      add_to_sum(e);
      if (e > 0) weighted += e * gap;
    }
  }
};

template <class C>
struct GroupMax {
  VecOf<C> max = splat<C>(-std::numeric_limits<C>::infinity());
  IntVecOf<C> nan{};

  void add(VecOf<C> z) {
    max = opd::cpu::OPD_CPU_VARIANT::max<C>(z, max);
    nan |= (z != z);
  }
  C reduce() const {
    C best = max[0];
    for (int i = 1; i < kLanes<C>; ++i) best = max[i] > best ? max[i] : best;
    return best;
  }
  bool any_nan() const {
    bool any = false;
    for (int i = 0; i < kLanes<C>; ++i) any |= nan[i] != 0;
    return any;
  }
};

// buffer: count elements, a multiple of kGroup, absent ones -inf. chunk_max: their maximum, finite or -inf.
template <class C, bool kCompensate>
OPD_INLINE void add_chunk(const C* buffer, int64_t count, double chunk_max, double temperature, Statistics* total) {
  if (!(chunk_max > -kInf)) return;
  total->raise_max(chunk_max, temperature);
  const ExponentScale<C> scale = exponent_scale<C>(total->max, temperature);
  double sums[kLanes<C>] = {}, weights[kLanes<C>] = {};
  for (int64_t i = 0; i < count; i += kGroup<C>) {
    VecOf<C> sum{}, weighted{};
    for (int v = 0; v < 8; ++v) {
      VecOf<C> exponent2;
      const VecOf<C> e = exp_scaled<C, kCompensate>(load(buffer + i + v * kLanes<C>), scale, &exponent2);
      sum += e;
      weighted += e * exponent2;
    }
    for (int lane = 0; lane < kLanes<C>; ++lane) {
      sums[lane] += static_cast<double>(sum[lane]);
      weights[lane] += static_cast<double>(weighted[lane]);
    }
  }
  double sum = 0, weighted = 0;
  for (int lane = 0; lane < kLanes<C>; ++lane) {
    sum += sums[lane];
    weighted += weights[lane];
  }
  total->add_to_sum(sum);
  total->weighted += weighted * kLn2;
}

template <class C>
OPD_INLINE GroupMax<C> chunk_maximum(const C* buffer, int64_t count) {
  GroupMax<C> best;
  for (int64_t i = 0; i < count; i += kLanes<C>) best.add(load(buffer + i));
  return best;
}

// Adds `count` logits given by get(i), each above -inf or poisonous, a chunk at a time.
template <class C, bool kCompensate, class Get>
OPD_INLINE void add_logits(int64_t count, const Get& get, double temperature, C* buffer, Statistics* total) {
  for (int64_t start = 0; start < count; start += kChunk<C>) {
    const int64_t part = count - start < kChunk<C> ? count - start : kChunk<C>, padded = round_up_to_group<C>(part);
    for (int64_t i = 0; i < part; ++i) buffer[i] = get(start + i);
    for (int64_t i = part; i < padded; ++i) buffer[i] = -std::numeric_limits<C>::infinity();
    const GroupMax<C> best = chunk_maximum(buffer, padded);
    const double chunk_max = best.reduce();
    if (best.any_nan() || chunk_max == kInf) {
      total->poisoned = true;
      return;
    }
    add_chunk<C, kCompensate>(buffer, padded, chunk_max, temperature, total);
  }
}

// All statistics of a row: those of every column, and those of the tail.
template <class Score>
OPD_INLINE void write_statistics(const Statistics& total, const Statistics& tail, Score* stats) {
  const bool poisoned = total.poisoned || tail.poisoned;
  stats[kMax] = static_cast<Score>(poisoned ? kNaN : total.max);
  stats[kSum] = static_cast<Score>(poisoned ? kNaN : total.sum + total.lost);
  stats[kWeighted] = static_cast<Score>(poisoned ? kNaN : total.weighted);
  stats[kTailMax] = static_cast<Score>(poisoned ? kNaN : tail.max);
  stats[kTailSum] = static_cast<Score>(poisoned ? kNaN : tail.sum + tail.lost);
}

}  // namespace opd::cpu::OPD_CPU_VARIANT
