// A chunk of a row, walked in groups of eight vectors of the compute type. Logits of that type, and halves that are
// widened in registers, are read where they lie; a group is copied into an L1-resident buffer only where the row ends
// within it, or where columns have to be taken out of it.
#pragma once

#include <algorithm>

#include "kernels/cpu/variant/elements.h"

namespace opd::cpu::OPD_CPU_VARIANT {

template <class Element>
constexpr Element minus_infinity() {
  if constexpr (std::is_same<Element, BFloat16>::value) {
    return {0xff80};
  } else if constexpr (std::is_same<Element, Float16>::value) {
    return {0xfc00};
  } else {
    return -std::numeric_limits<Element>::infinity();
  }
}

template <class Scalar>
constexpr bool kReadInPlace = std::is_same<Scalar, ComputeOf<Scalar>>::value || kInRegisters<Scalar>;

// visit(g, use) calls use(read): read(v), 0 <= v < 8, are the vectors of group g, its elements in any order.
template <class Scalar>
class Chunk {
 public:
  using C = ComputeOf<Scalar>;
  // A lifted group keeps its type where that is read in place: which of the two is read is then a choice of address. A
  // branch would be taken wrongly at each of k groups, and drain the pipeline four times.
  using Element = std::conditional_t<kReadInPlace<Scalar>, Scalar, C>;

  // ahead: what will be read after this row, asked for into the second cache while this chunk is computed with, as what
  // the row goes on with is into the first; nullptr for nothing.
  Chunk(const Scalar* source, int64_t count, const Scalar* ahead = nullptr)
      : source_(source), next_(source + count), ahead_(ahead), count_(round_up_to_group<C>(count) / kGroup<C>) {
    const int64_t in_place = kReadInPlace<Scalar> ? count / kGroup<C> : 0, columns = in_place * kGroup<C>;
    for (int64_t g = 0; g < count_; ++g) is_lifted_[g] = g >= in_place;
    if constexpr (kReadInPlace<Scalar>) {
      std::copy(source + columns, source + count, own_ + columns);
      std::fill(own_ + count, own_ + count_ * kGroup<C>, kAbsentLogit);
    } else {
      widen(source, count, own_);
    }
  }
  int64_t count() const { return count_; }
  template <class Use>
  OPD_ALWAYS_INLINE void visit(int64_t g, const Use& use) const {
    const Element* group = elements(g);
    if constexpr (kInRegisters<Scalar>) {
      use([group](int v) { return load_half(group + v / 2 * (2 * kLanes<C>), v % 2); });
    } else {
      use([group](int v) { return load<C>(group + v * kLanes<C>); });
    }
  }
  void remove(int64_t column) { lift(column / kGroup<C>)[column % kGroup<C>] = kAbsentLogit; }
  // The group's elements in order, of the compute type: where they are, or widened into `storage` [kGroup<C>].
  const C* in_order(int64_t g, C* storage) const {
    if constexpr (std::is_same<Element, C>::value) {
      return elements(g);
    } else {
      widen(elements(g), kGroup<C>, storage);
      return storage;
    }
  }
  OPD_ALWAYS_INLINE void prefetch_after(int64_t g) const {
    constexpr int64_t kLine = 64 / sizeof(Scalar);
    const int64_t from = g * kGroup<C>, to = from + kGroup<C>;
    for (int64_t i = from; i < to; i += kLine) __builtin_prefetch(next_ + i, 0, 3);
    if (ahead_ == nullptr) return;
    for (int64_t i = from; i < to; i += kLine) __builtin_prefetch(ahead_ + i, 0, 2);
  }

 private:
  static constexpr Element kAbsentLogit = minus_infinity<Element>();

  OPD_ALWAYS_INLINE const Element* elements(int64_t g) const {
    const Element* own = own_ + g * kGroup<C>;
    if constexpr (kReadInPlace<Scalar>) return is_lifted_[g] ? own : source_ + g * kGroup<C>;
    return own;
  }
  Element* lift(int64_t g) {
    Element* own = own_ + g * kGroup<C>;
    if constexpr (kReadInPlace<Scalar>) {
      if (!is_lifted_[g]) std::copy_n(source_ + g * kGroup<C>, kGroup<C>, own);
      is_lifted_[g] = true;
    }
    return own;
  }

  const Scalar *source_, *next_, *ahead_;
  int64_t count_;
  bool is_lifted_[kChunk<C> / kGroup<C>];
  alignas(64) Element own_[kChunk<C>];
};

// Whole groups of the compute type that lie in one piece.
template <class Compute>
struct Groups {
  using C = Compute;
  const C* start;
  int64_t num;

  int64_t count() const { return num; }
  template <class Use>
  OPD_ALWAYS_INLINE void visit(int64_t g, const Use& use) const {
    const C* group = start + g * kGroup<C>;
    use([group](int v) { return load<C>(group + v * kLanes<C>); });
  }
  void prefetch_after(int64_t) const {}
};

}  // namespace opd::cpu::OPD_CPU_VARIANT
