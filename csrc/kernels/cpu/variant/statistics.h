// Online statistics of a row, chunk by chunk: maximum m, s = sum e^((z-m)/t), w = sum e^((z-m)/t) (z-m)/t.
// Inside a chunk sums run in the compute type over at most 8 terms a lane, then in double: a row of 150,000 equal
// terms loses no digit. docs/math.md (5).
#pragma once

#include "kernels/cpu/variant/chunk.h"

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

// The largest lane, NaN left out.
template <class C>
OPD_INLINE C largest_lane(VecOf<C> v) {
  C best = v[0];
  for (int i = 1; i < kLanes<C>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <class ManyGroups>
OPD_INLINE VecOf<typename ManyGroups::C> group_maximum(const ManyGroups& groups, int64_t g,
                                                       VecOf<typename ManyGroups::C> best) {
  groups.visit(g, [&](const auto& read) {
    for (int v = 0; v < 8; ++v) best = max<typename ManyGroups::C>(read(v), best);
  });
  return best;
}

// NaN left out: it shows when the exponentials are summed.
template <class ManyGroups>
OPD_INLINE typename ManyGroups::C maximum(const ManyGroups& groups) {
  using C = typename ManyGroups::C;
  VecOf<C> even = splat<C>(-std::numeric_limits<C>::infinity()), odd = even;
  int64_t g = 0;
  for (; g + 1 < groups.count(); g += 2) {
    even = group_maximum(groups, g, even);
    odd = group_maximum(groups, g + 1, odd);
  }
  if (g < groups.count()) even = group_maximum(groups, g, even);
  return largest_lane<C>(max<C>(even, odd));
}

template <bool kOffset, class ManyGroups>
OPD_INLINE void sum_exponentials(const ManyGroups& groups, const ExponentScale<typename ManyGroups::C>& scale,
                                 Statistics* total) {
  using C = typename ManyGroups::C;
  LaneSums<C> sums, weights;
  for (int64_t g = 0; g < groups.count(); ++g) {
    groups.prefetch_after(g);
    groups.visit(g, [&](const auto& read) {
      VecOf<C> sum{}, weighted{};
      for (int v = 0; v < 8; ++v) {
        VecOf<C> exponent2;
        const VecOf<C> e = exp_scaled<C, kOffset>(read(v), scale, &exponent2);
        sum += e;
        weighted += e * exponent2;
      }
      sums.add(sum);
      weights.add(weighted);
    });
  }
  total->add_to_sum(sums.total());
  total->weighted += weights.total() * kLn2;
}

// For rows of about the lowest finite value, and for the NaN of rows without one above -inf: rare, so simple.
template <class ManyGroups>
OPD_INLINE void add_one_by_one(const ManyGroups& groups, double temperature, Statistics* total) {
  using C = typename ManyGroups::C;
  for (int64_t g = 0; g < groups.count(); ++g) {
    groups.visit(g, [&](const auto& read) {
      for (int v = 0; v < 8; ++v) {
        const VecOf<C> z = read(v);
        for (int lane = 0; lane < kLanes<C>; ++lane) total->add_logit(static_cast<double>(z[lane]), temperature);
      }
    });
  }
}

// Adds groups of logits, absent ones -inf. largest: their maximum, NaN left out.
template <bool kCompensate, class ManyGroups>
OPD_INLINE void add_groups(const ManyGroups& groups, double largest, double temperature, Statistics* total) {
  using C = typename ManyGroups::C;
  if (largest == -kInf) return add_one_by_one(groups, temperature, total);
  if (largest == kInf) {
    total->poisoned = true;
    return;
  }
  total->raise_max(largest, temperature);
  const ExponentScale<C> scale = exponent_scale<C>(total->max, temperature);
  if (!scale.is_floor_zero) {
    add_one_by_one(groups, temperature, total);
  } else if (kCompensate && scale.is_offset_small) {
    sum_exponentials<kCompensate>(groups, scale, total);
  } else {
    sum_exponentials<false>(groups, scale, total);
  }
  total->poisoned |= total->weighted != total->weighted;  // 0 x NaN is NaN
}

// Adds `count` logits given by get(i), each above -inf or poisonous, a chunk at a time.
template <class C, bool kCompensate, class Get>
OPD_INLINE void add_logits(int64_t count, const Get& get, double temperature, C* buffer, Statistics* total) {
  for (int64_t start = 0; start < count; start += kChunk<C>) {
    const int64_t part = count - start < kChunk<C> ? count - start : kChunk<C>, padded = round_up_to_group<C>(part);
    for (int64_t i = 0; i < part; ++i) buffer[i] = get(start + i);
    for (int64_t i = part; i < padded; ++i) buffer[i] = -std::numeric_limits<C>::infinity();
    const Groups<C> groups{buffer, padded / kGroup<C>};
    add_groups<kCompensate>(groups, maximum(groups), temperature, total);
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
