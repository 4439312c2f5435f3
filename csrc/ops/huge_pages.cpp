// See huge_pages.h; madvise is a hint, so nothing here can fail.
#include "ops/huge_pages.h"

#include <cstdint>

#include "ops/pieces.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace opd::ops {

using torch::stable::Tensor;

Tensor new_gradient(const Tensor& logits) {
  Tensor gradient = torch::stable::new_empty(logits, logits.sizes());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (logits.is_cpu()) {
    const bool is_half = logits.scalar_type() == torch::headeronly::ScalarType::BFloat16 ||
                         logits.scalar_type() == torch::headeronly::ScalarType::Half;
    const uintptr_t bytes = static_cast<uintptr_t>(gradient.numel()) *
                            (is_half                                                         ? 2
                             : logits.scalar_type() == torch::headeronly::ScalarType::Double ? 8
                                                                                             : 4);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(gradient.data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = (begin + bytes) & ~(kHugePage - 1);
    // Only whole huge pages inside the allocation: its neighbours are not ours to advise. Best effort: no check.
    if (first + 2 * kHugePage <= last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return gradient;
}

}  // namespace opd::ops
