// Gradient of all scores with respect to one shard's logits, docs/math.md's "one backward for all". Bound: one read
// of the logits and one write; rows without upstream gradient are not read. One exponential an element: with
// E = e^((z - m_tail)/t), off the support dz = E (a + b log2 E), and q = E e^((m_tail - m)/t) / s.
#include <algorithm>
#include <memory>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/variant/statistics.h"

namespace opd::cpu::OPD_CPU_VARIANT {

namespace {

// A column whose gradient the streaming formula does not give: on the support, or the target.
struct Exception {
  int64_t column;
  double upstream;  // d_v + [v = target] d_target
  bool on_support;
};
bool operator<(const Exception& a, const Exception& b) { return a.column < b.column; }

struct Upstream {
  double sum, tail, lse, entropy, target;
  bool is_zero, is_invalid;
};

template <class Score>
Upstream read_upstream(const ScoresBackwardParams& p, int64_t row) {
  const Score* up = static_cast<const Score*>(p.upstream) + row * (p.k + 4);
  Upstream u{0, up[p.k], up[p.k + 1], up[p.k + 2], up[p.k + 3], true, false};
  for (int64_t j = 0; j < p.k; ++j) {
    const int64_t id = p.indices[row * p.k + j];
    u.is_invalid |= is_invalid_id(id, p.vocab_size);
    if (id == kAbsent) continue;
    u.sum += up[j];
    u.is_zero &= up[j] == 0;
  }
  const int64_t target = p.target == nullptr ? kAbsent : p.target[row];
  if (target == kAbsent) u.target = 0;
  u.is_invalid |= is_invalid_id(target, p.vocab_size);
  u.is_zero &= u.tail == 0 && u.lse == 0 && u.entropy == 0 && u.target == 0;
  return u;
}

template <class Scalar>
void fill(Scalar* grad, int64_t count, double value) {
  const Scalar rounded = round_to<Scalar>(value);
  std::fill(grad, grad + count, rounded);
}

// dz = E (offset + slope log2 E).
template <class C>
struct Stream {
  ExponentScale<C> scale;
  C offset, slope;

  OPD_ALWAYS_INLINE VecOf<C> gradient(VecOf<C> e, VecOf<C> exponent2) const {
    const VecOf<C> dz = e * (offset + slope * exponent2);
    return e > C{0} ? dz : VecOf<C>{};  // also where the factor is infinite
  }
  // Of a chunk; target may be the chunk itself. kMask: where the scale's floor is not 0.
  template <bool kOffset, bool kMask = false>
  OPD_ALWAYS_INLINE void run(const C* chunk, int64_t count, C* target) const {
    for (int64_t i = 0; i < count; i += kLanes<C>) {
      VecOf<C> exponent2;
      const VecOf<C> z = load(chunk + i);
      VecOf<C> e = exp_scaled<C, kOffset>(z, scale, &exponent2);
      if (kMask) e = z > -std::numeric_limits<C>::infinity() ? e : VecOf<C>{};
      store(target + i, gradient(e, exponent2));
    }
  }
};

// The leading whole vectors of a row in half precision, widened and rounded in registers: no buffer between. Returns
// how many columns that were; 0 where the gradient may hold a NaN, which rounding would have to look for, or where -inf
// has to be.
template <class Scalar, class C>
OPD_INLINE int64_t run_in_registers(const Stream<C>& stream, const Scalar* logits, int64_t count, Scalar* grad) {
  if constexpr (kInRegisters<Scalar>) {
    if (!std::isfinite(stream.offset) || !std::isfinite(stream.slope) || !stream.scale.is_floor_zero) return 0;
    const auto gradient = [&](FloatVec z) {
      FloatVec exponent2;
      const FloatVec e = exp_scaled_rough(z, stream.scale, &exponent2);
      return e * (stream.offset + stream.slope * exponent2);
    };
    const int64_t whole = count / (2 * kLanes<C>)*(2 * kLanes<C>);
    for (int64_t i = 0; i < whole; i += 2 * kLanes<C>) {
      store_pair(grad + i, gradient(load_half(logits + i, 0)), gradient(load_half(logits + i, 1)));
    }
    return whole;
  }
  static_cast<void>(stream), static_cast<void>(logits), static_cast<void>(count), static_cast<void>(grad);
  return 0;
}

template <class Scalar>
void rows_of(const ScoresBackwardParams& p, int64_t begin, int64_t end) {
  using C = ComputeOf<Scalar>;
  using Score = ScoreOf<Scalar>;
  const int64_t valid = p.logits.num_valid, width = p.logits.width;
  alignas(64) C buffer[kChunk<C>];
  const std::unique_ptr<Exception[]> exceptions(new Exception[p.k + 1]);
  const std::unique_ptr<double[]> exception_grads(new double[p.k + 1]);
  for (int64_t row = begin; row < end; ++row) {
    Scalar* grad = row_pointer<Scalar>(p.grad, row);
    const Upstream u = read_upstream<Score>(p, row);
    if (u.is_zero) {
      fill(grad, width, 0);
      continue;
    }
    const Score* stats = static_cast<const Score*>(p.stats) + row * kNumStats;
    const double m = stats[kMax], s = stats[kSum], m_tail = stats[kTailMax], s_tail = stats[kTailSum];
    if (u.is_invalid || !(m > -kInf && m < kInf)) {
      fill(grad, valid, kNaN);
      fill(grad + valid, width - valid, 0);
      continue;
    }
    const Scalar* logits = row_pointer<Scalar>(p.logits, row);
    const double t = temperature_of(p.temperature, row), log_s = std::log(s);
    const double entropy = log_s - static_cast<double>(stats[kWeighted]) / s;
    const bool has_tail = m_tail > -kInf;
    const double d_tail = has_tail ? u.tail : 0;
    // dz = (q (shared - d_H (log q + H)) + ...) / t
    const double shared = u.lse - (u.sum + d_tail + u.target);

    // Support and target first: they read their logits before an in-place pass overwrites them.
    int64_t num_exceptions = 0;
    const Score* up = static_cast<const Score*>(p.upstream) + row * (p.k + 4);
    for (int64_t j = 0; j < p.k; ++j) {
      const int64_t column = p.indices[row * p.k + j] - p.vocab_start_index;
      if (p.indices[row * p.k + j] != kAbsent && 0 <= column && column < valid) {
        exceptions[num_exceptions++] = {column, up[j], true};
      }
    }
    const int64_t target_column =
        p.target == nullptr || p.target[row] == kAbsent ? -1 : p.target[row] - p.vocab_start_index;
    if (0 <= target_column && target_column < valid) {
      int64_t j = 0;
      while (j < num_exceptions && exceptions[j].column != target_column) ++j;
      if (j == num_exceptions) exceptions[num_exceptions++] = {target_column, 0, false};
      exceptions[j].upstream += u.target;
    }
    std::sort(exceptions.get(), exceptions.get() + num_exceptions);
    for (int64_t i = 0; i < num_exceptions; ++i) {
      const double z = to_float(logits[exceptions[i].column]);
      double dz = 0;
      if (z > -kInf) {
        const double log_q = (z - m) / t - log_s, q = std::exp(log_q);
        dz = exceptions[i].upstream;
        if (q > 0) dz += q * (u.entropy == 0 ? shared : shared - u.entropy * (log_q + entropy));
        if (!exceptions[i].on_support) {
          const double share = std::exp((z - m_tail) / t) / s_tail;
          if (share > 0) dz += d_tail * share;
        }
      }
      exception_grads[i] = dz / t;
    }

    if (has_tail) {
      const double gap = (m_tail - m) / t, tail_share = std::exp(gap) / s;
      double a = d_tail / s_tail, b = 0;
      if (tail_share > 0) {
        a += tail_share * (u.entropy == 0 ? shared : shared - u.entropy * (gap - log_s + entropy));
        b = u.entropy == 0 ? 0 : -u.entropy * tail_share * kLn2;
      }
      const Stream<C> stream{exponent_scale<C>(m_tail, t), static_cast<C>(a / t), static_cast<C>(b / t)};
      const int64_t streamed = run_in_registers(stream, logits, valid, grad);
      int64_t next = 0;
      for (; next < num_exceptions && exceptions[next].column < streamed; ++next) {
        grad[exceptions[next].column] = round_to<Scalar>(static_cast<C>(exception_grads[next]));
      }
      for (int64_t start = streamed; start < valid; start += kChunk<C>) {
        const int64_t count = std::min(kChunk<C>, valid - start), padded = round_up_to_group<C>(count);
        const C* chunk = chunk_of(logits + start, count, buffer);
        C* out = buffer;
        if constexpr (std::is_same<Scalar, C>::value) out = chunk == buffer ? buffer : grad + start;
        if (!stream.scale.is_floor_zero) {
          stream.template run<false, true>(chunk, padded, out);
        } else if (kCompensated<Scalar> && stream.scale.is_offset_small) {
          stream.template run<kCompensated<Scalar>>(chunk, padded, out);
        } else {
          stream.template run<false>(chunk, padded, out);
        }
        for (; next < num_exceptions && exceptions[next].column < start + count; ++next) {
          out[exceptions[next].column - start] = static_cast<C>(exception_grads[next]);
        }
        if (out == buffer) narrow(buffer, count, grad + start);
      }
    } else {  // every off-support logit is -inf
      fill(grad, valid, 0);
      for (int64_t i = 0; i < num_exceptions; ++i) {
        grad[exceptions[i].column] = round_to<Scalar>(static_cast<C>(exception_grads[i]));
      }
    }
    fill(grad + valid, width - valid, 0);
  }
}

}  // namespace

void scores_backward(const ScoresBackwardParams& p, int64_t begin, int64_t end) {
  with_scalar(p.logits.dtype, [&](auto scalar) { rows_of<decltype(scalar)>(p, begin, end); });
}

}  // namespace opd::cpu::OPD_CPU_VARIANT
