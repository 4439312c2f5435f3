// The divergences, one bucket at a time, from the two log-probabilities: value and derivative with respect to log q.
// Written once for scalars and for vectors of doubles: OPD_DIVERGENCE_NAMESPACE gives each translation unit that
// compiles it for another instruction set a namespace of its own. docs/math.md, "Divergences".
//
// Terms take their non-negative form a (expm1(u) - u), u = log b - log a, which sums to KL(a || b) where both sum to
// one, is b where a = 0, and loses no digit as b -> a. `plain` switches to a (log a - log b) for truncated supports.
#pragma once

#include <cmath>

#include "kernels/params.h"

namespace OPD_DIVERGENCE_NAMESPACE {

constexpr double kInfinity = __builtin_huge_val();

// A scalar double with the same operations as a vector of them.
struct ScalarMath {
  using V = double;
  OPD_HOST_DEVICE static V exp(V x) { return ::exp(x); }
  OPD_HOST_DEVICE static V log(V x) { return ::log(x); }
};

// expm1(u) - u, relative accuracy for |u| <= 1: Taylor, truncated below 1e-16 of the first term.
template <class M>
OPD_HOST_DEVICE inline typename M::V expm1_minus_u_series(typename M::V u) {
  typename M::V p = u * (1.0 / 121645100408832000.0) + 1.0 / 6402373705728000.0;
  p = p * u + 1.0 / 355687428096000.0;
  p = p * u + 1.0 / 20922789888000.0;
  p = p * u + 1.0 / 1307674368000.0;
  p = p * u + 1.0 / 87178291200.0;
  p = p * u + 1.0 / 6227020800.0;
  p = p * u + 1.0 / 479001600.0;
  p = p * u + 1.0 / 39916800.0;
  p = p * u + 1.0 / 3628800.0;
  p = p * u + 1.0 / 362880.0;
  p = p * u + 1.0 / 40320.0;
  p = p * u + 1.0 / 5040.0;
  p = p * u + 1.0 / 720.0;
  p = p * u + 1.0 / 120.0;
  p = p * u + 1.0 / 24.0;
  p = p * u + 1.0 / 6.0;
  p = p * u + 0.5;
  return p * u * u;
}

template <class M>
OPD_HOST_DEVICE inline typename M::V is_small(typename M::V u, typename M::V yes, typename M::V no) {
  return (u <= 1.0) & (u >= -1.0) ? yes : no;
}

// b - a from a and u = log b - log a, without cancellation.
template <class M>
OPD_HOST_DEVICE inline typename M::V difference(typename M::V a, typename M::V b, typename M::V u) {
  return is_small<M>(u, a * (expm1_minus_u_series<M>(u) + u), b - a);
}

// One bucket's share of KL(a || b).
template <class M>
OPD_HOST_DEVICE inline typename M::V kl_term(typename M::V log_a, typename M::V log_b, typename M::V a, typename M::V b,
                                             bool plain) {
  using V = typename M::V;
  const V u = log_b - log_a, zero = V{} + 0.0;
  const V cost = a > 0.0 ? a * u : a == 0.0 ? zero : a;  // 0 where the factor is 0, NaN where a is NaN
  V term = plain ? -cost : is_small<M>(u, a * expm1_minus_u_series<M>(u), (b - a) - cost);
  term = log_a == -kInfinity ? (plain ? b * 0.0 : b) : term;
  return (log_b == -kInfinity) & (log_a > -kInfinity) ? V{} + kInfinity : term;
}

template <class V>
struct BucketTerm {
  V value;
  V gradient;  // d value / d log q; infinite where the value is
};

// p_weight p + q_weight q: its log minus log p and minus log q. Of one weight, a small other could not be known.
template <class M>
OPD_HOST_DEVICE inline void log_mixture(typename M::V r, double p_weight, double q_weight, typename M::V* minus_log_p,
                                        typename M::V* minus_log_q) {
  using V = typename M::V;
  // Relative to the larger side, so that nothing overflows: r = log q - log p.
  const V magnitude = r >= 0.0 ? -r : r;
  const V near = r >= 0.0 ? V{} + q_weight : V{} + p_weight, far = r >= 0.0 ? V{} + p_weight : V{} + q_weight;
  const V small = M::exp(magnitude);
  const V shift = far * (expm1_minus_u_series<M>(magnitude) + magnitude);  // far * expm1(magnitude)
  const V argument = is_small<M>(r, 1.0 + shift, near + far * small);
  const V lost = is_small<M>(r, (shift - (argument - 1.0)) / argument, V{} + 0.0);
  const V log_argument = M::log(argument) + lost;
  *minus_log_q = r >= 0.0 ? log_argument : log_argument - r;
  *minus_log_p = r >= 0.0 ? log_argument + r : log_argument;
}

template <class M>
OPD_HOST_DEVICE inline BucketTerm<typename M::V> bucket_term(const opd::DivergenceSpec& divergence, typename M::V log_q,
                                                             typename M::V log_p, bool plain) {
  using V = typename M::V;
  using opd::Divergence;
  const V q = M::exp(log_q), p = M::exp(log_p), r = log_q - log_p, zero = V{} + 0.0;
  const V both_absent_nan = (log_q == -kInfinity) & (log_p == -kInfinity) ? zero : r;
  if (divergence.kind == Divergence::kReverseKL) {
    const V value = kl_term<M>(log_q, log_p, q, p, plain);
    const V cost = q > 0.0 ? q * r : q == 0.0 ? zero : q;
    const V gradient = plain ? cost + q : cost;
    return {value, (log_p == -kInfinity) & (log_q > -kInfinity) ? V{} + kInfinity : gradient};
  }
  if (divergence.kind == Divergence::kForwardKL) {
    const V value = kl_term<M>(log_p, log_q, p, q, plain);
    const V gradient = plain ? -p : log_p == -kInfinity ? q : difference<M>(p, q, r);
    return {value, (log_q == -kInfinity) & (log_p > -kInfinity) ? V{} - kInfinity : gradient};
  }
  const double mix = divergence.mix;  // weight of p, except in skew_reverse_kl: weight of q
  const bool skew_reverse = divergence.kind == Divergence::kSkewReverseKL;
  const double p_weight = skew_reverse ? 1.0 - mix : mix, q_weight = skew_reverse ? mix : 1.0 - mix;
  V minus_log_p, minus_log_q;
  log_mixture<M>(both_absent_nan, p_weight, q_weight, &minus_log_p, &minus_log_q);
  // Where one side is absent the mixture is the other's share of itself.
  const V log_m = log_q >= log_p ? log_q + minus_log_q : log_p + minus_log_p, m = M::exp(log_m);
  // KL(a || m) with log m - log a taken from log_mixture, not from rounded logs.
  const auto term = [&](V log_a, V a, V u) -> V {
    const V cost = a > 0.0 ? a * u : a == 0.0 ? zero : a;
    const V value = plain ? -cost : is_small<M>(u, a * expm1_minus_u_series<M>(u), (m - a) - cost);
    return log_a == -kInfinity ? (plain ? m * 0.0 : m) : value;
  };
  const V safe_m = m > 0.0 ? m : V{} + 1.0;                           // ratios below are 0 / 0 only where all is 0
  const V q_cost = q > 0.0 ? -q * minus_log_q : q == 0.0 ? zero : q;  // q (log q - log m)
  if (divergence.kind == Divergence::kSkewForwardKL) {
    // m - p = q_weight (q - p)
    const V excess = plain ? -p
                           : q_weight * (log_p == -kInfinity   ? q
                                         : log_q == -kInfinity ? -p
                                                               : difference<M>(p, q, r));
    return {term(log_p, p, minus_log_p), q_weight * q * excess / safe_m};
  }
  if (skew_reverse) {
    const V ratio = q / safe_m;
    const V gradient = plain ? q_cost + q * (1.0 - q_weight * ratio) : q_cost + q_weight * q * (1.0 - ratio);
    return {term(log_q, q, minus_log_q), gradient};
  }
  const V value = p_weight * term(log_p, p, minus_log_p) + q_weight * term(log_q, q, minus_log_q);
  // The mixture's own derivative cancels exactly: p_weight p/m + q_weight q/m = 1.
  return {value, q_weight * q_cost};
}

// What flooring the teacher adds to the plain sum beyond the non-negative terms: see docs/math.md, "Floors".
OPD_HOST_DEVICE inline double floored_mass_correction(const opd::DivergenceSpec& divergence, double added_mass) {
  switch (divergence.kind) {
    case opd::Divergence::kForwardKL:
      return added_mass;
    case opd::Divergence::kReverseKL:
      return -added_mass;
    case opd::Divergence::kSkewForwardKL:
      return (1 - divergence.mix) * added_mass;
    case opd::Divergence::kSkewReverseKL:
      return -(1 - divergence.mix) * added_mass;
    case opd::Divergence::kJSD:
      return 0;
  }
  return 0;
}

}  // namespace OPD_DIVERGENCE_NAMESPACE
