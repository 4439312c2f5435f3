// Gather: one shard's share of k given ids' logits, and its statistics with the tail summed over the off-support
// columns. Bound: one read of the logits. Support columns are taken out of a copy of their group, so the tail costs no
// second exponential; they join the total afterwards, k of them.
#include <algorithm>
#include <memory>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/variant/statistics.h"

namespace opd::cpu::OPD_CPU_VARIANT {

namespace {

struct LocalId {
  int64_t column;
};
bool operator<(LocalId a, LocalId b) { return a.column < b.column; }
bool operator==(LocalId a, LocalId b) { return a.column == b.column; }

template <class Scalar>
void rows_of(const GatherPartialsParams& p, int64_t begin, int64_t end) {
  using C = ComputeOf<Scalar>;
  using Score = ScoreOf<Scalar>;
  const int64_t valid = p.logits.num_valid, support_width = p.k + (p.target != nullptr);
  alignas(64) C buffer[kChunk<C>];
  const std::unique_ptr<LocalId[]> owned(new LocalId[p.k + 1]);
  for (int64_t row = begin; row < end; ++row) {
    const Scalar* logits = row_pointer<Scalar>(p.logits, row);
    const double temperature = temperature_of(p.temperature, row);
    Score* support = static_cast<Score*>(p.support_logits) + row * support_width;
    int64_t num_owned = 0;
    for (int64_t j = 0; j < p.k; ++j) {
      const int64_t column = p.indices[row * p.k + j] - p.vocab_start_index;
      const bool is_owned = 0 <= column && column < valid;
      support[j] = is_owned ? static_cast<Score>(to_float(logits[column])) : Score{0};
      if (is_owned) owned[num_owned++] = {column};
    }
    if (p.target != nullptr) {
      const int64_t column = p.target[row] - p.vocab_start_index;
      support[p.k] = 0 <= column && column < valid ? static_cast<Score>(to_float(logits[column])) : Score{0};
    }
    std::sort(owned.get(), owned.get() + num_owned);

    Statistics tail;
    // An id given twice is no support: its mass would count twice in the total and once off the tail.
    tail.poisoned = std::adjacent_find(owned.get(), owned.get() + num_owned) != owned.get() + num_owned;
    int64_t next = 0;
    for (int64_t start = 0; start < valid && !tail.poisoned; start += kChunk<C>) {
      const int64_t count = std::min(kChunk<C>, valid - start);
      Chunk<Scalar> chunk(logits + start, count);
      for (; next < num_owned && owned[next].column < start + count; ++next) {
        chunk.remove(owned[next].column - start);
      }
      add_groups<kCompensated<Scalar>>(chunk, maximum(chunk), temperature, &tail);
    }
    Statistics total = tail;
    const auto owned_logit = [&](int64_t i) { return static_cast<C>(to_float(logits[owned[i].column])); };
    add_logits<C, kCompensated<Scalar>>(num_owned, owned_logit, temperature, buffer, &total);
    write_statistics(total, tail, static_cast<Score*>(p.stats) + row * kNumStats);
  }
}

}  // namespace

void gather_partials(const GatherPartialsParams& p, int64_t begin, int64_t end) {
  with_scalar(p.logits.dtype, [&](auto scalar) { rows_of<decltype(scalar)>(p, begin, end); });
}

}  // namespace opd::cpu::OPD_CPU_VARIANT
