// This variant's entry in the dispatch table.
#include "kernels/cpu/kernels.h"

#define OPD_STRINGIZE_(x) #x
#define OPD_STRINGIZE(x) OPD_STRINGIZE_(x)

namespace opd::cpu::OPD_CPU_VARIANT {

void topk_partials(const TopkPartialsParams&, int64_t begin, int64_t end);
void gather_partials(const GatherPartialsParams&, int64_t begin, int64_t end);
void scores_backward(const ScoresBackwardParams&, int64_t begin, int64_t end);
void full_divergence(const FullDivergenceParams&, int64_t begin, int64_t end);
void full_divergence_backward(const FullDivergenceParams&, int64_t begin, int64_t end);

void merge_topk(const MergeTopkParams&, int64_t begin, int64_t end);
void merge_gather(const MergeGatherParams&, int64_t begin, int64_t end);
void combine_topk_partials(const MergeTopkParams&, int32_t* combined, int64_t begin, int64_t end);
void combine_gather_partials(const MergeGatherParams&, int64_t begin, int64_t end);

extern const VariantKernels kKernels;
const VariantKernels kKernels = {
    OPD_STRINGIZE(OPD_CPU_VARIANT), topk_partials, gather_partials, scores_backward,       full_divergence,
    full_divergence_backward,       merge_topk,    merge_gather,    combine_topk_partials, combine_gather_partials};

}  // namespace opd::cpu::OPD_CPU_VARIANT
