// Chooses the instruction-set variant when the library loads, never at compile time: one binary runs everywhere.
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/kernels.h"

namespace opd::cpu {

namespace baseline {
extern const VariantKernels kKernels;
}
#ifdef OPD_HAVE_VARIANT_AVX2
namespace avx2 {
extern const VariantKernels kKernels;
}
#endif
#ifdef OPD_HAVE_VARIANT_AVX512
namespace avx512 {
extern const VariantKernels kKernels;
}
#endif
#ifdef OPD_HAVE_VARIANT_NEON
namespace neon {
extern const VariantKernels kKernels;
}
#endif

namespace {

struct Candidate {
  const VariantKernels* kernels;
  bool supported;
};

constexpr int kMaxVariants = 4;

// Best first.
int list_variants(Candidate* out) {
  int count = 0;
#ifdef OPD_HAVE_VARIANT_AVX512
  out[count++] = {&avx512::kKernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                         __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2")};
#endif
#ifdef OPD_HAVE_VARIANT_AVX2
  out[count++] = {&avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
#endif
#ifdef OPD_HAVE_VARIANT_NEON
  out[count++] = {&neon::kKernels, true};
#endif
  out[count++] = {&baseline::kKernels, true};
  return count;
}

const VariantKernels* choose() {
  Candidate candidates[kMaxVariants];
  const int count = list_variants(candidates);
  const char* wanted = requested_variant();
  for (int i = 0; i < count; ++i) {
    if (!candidates[i].supported) continue;
    if (wanted[0] == '\0' || std::strcmp(wanted, candidates[i].kernels->name) == 0) return candidates[i].kernels;
  }
  return nullptr;
}

}  // namespace

const char* requested_variant() {
  const char* wanted = std::getenv("OPD_CPU_VARIANT");
  return wanted == nullptr ? "" : wanted;
}

const char* available_variants() {
  static char names[64] = "";
  static const bool filled = [] {
    Candidate candidates[kMaxVariants];
    const int count = list_variants(candidates);
    for (int i = 0; i < count; ++i) {
      if (!candidates[i].supported) continue;
      if (names[0] != '\0') std::strcat(names, ",");
      std::strcat(names, candidates[i].kernels->name);
    }
    return true;
  }();
  (void)filled;
  return names;
}

const VariantKernels* variant_kernels() {
  static const VariantKernels* const chosen = choose();
  return chosen;
}

// A merge knows no logits, so nobody has asked yet whether the variant exists.
static const VariantKernels& merges() { return variant_kernels() == nullptr ? baseline::kKernels : *variant_kernels(); }

void merge_topk(const MergeTopkParams& p, int64_t begin, int64_t end) { merges().merge_topk(p, begin, end); }
void merge_gather(const MergeGatherParams& p, int64_t begin, int64_t end) { merges().merge_gather(p, begin, end); }
void combine_topk_partials(const MergeTopkParams& p, int32_t* combined, int64_t begin, int64_t end) {
  merges().combine_topk_partials(p, combined, begin, end);
}
void combine_gather_partials(const MergeGatherParams& p, int64_t begin, int64_t end) {
  merges().combine_gather_partials(p, begin, end);
}

}  // namespace opd::cpu
