// See launch.h. The emulator is a third home, for tests: CUDA kernels on CPU tensors.
#include "ops/launch.h"

#include "kernels/cpu/kernels.h"

#if defined(OPD_WITH_CUDA) || defined(OPD_EMULATE_CUDA)
#define OPD_HAS_CUDA_KERNELS 1
#include "kernels/cuda/launchers.h"
#endif

#ifdef OPD_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
// Exported by libtorch_cuda only. Weak: null under a CPU-only torch, so that the module still loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace opd::ops {

namespace {

#if defined(OPD_EMULATE_CUDA)
bool on_cuda(const Context&) { return true; }
#elif defined(OPD_WITH_CUDA)
bool on_cuda(const Context& context) { return !context.like->is_cpu(); }
#else
bool on_cuda(const Context&) { return false; }
#endif

#ifdef OPD_HAS_CUDA_KERNELS

// launch(stream) on the tensors' device and its current stream; nothing waits for it.
template <class Launch>
void on_stream(const Context& context, const Launch& launch) {
  void* stream = nullptr;
#ifdef OPD_WITH_CUDA
  const auto device = context.like->get_device_index();
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, context.op, ": this torch was built without CUDA");
  const torch::stable::accelerator::DeviceGuard guard(device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  const int status = launch(stream);
  STD_TORCH_CHECK(status == 0, context.op, ": the CUDA kernel could not be launched: ", cuda::error_string(status));
}

cuda::Pieces cut(const Pieces& pieces) { return {pieces.count, pieces.columns}; }

// Blocks that fill the device twice, pieces of at least 8,192 columns; no piece wider than its bitmap may be.
Pieces cuda_pieces(const Context& context, const LogitsView& logits) {
  constexpr int64_t kMinColumns = 8192, kMaxColumns = 262144, kGranularity = 1024;
  const int64_t blocks = 2 * cuda::num_multiprocessors(context.like->get_device_index());
  int64_t count = logits.num_rows == 0 ? 1 : blocks / logits.num_rows;
  const int64_t most = logits.width / kMinColumns, least = (logits.width + kMaxColumns - 1) / kMaxColumns;
  if (count > most) count = most;
  if (count < least) count = least;
  if (count <= 1) return {1, logits.width};
  const int64_t columns = ((logits.width + count - 1) / count + kGranularity - 1) / kGranularity * kGranularity;
  return {(logits.width + columns - 1) / columns, columns};
}

#define OPD_ON_CUDA(num_rows, launch_expression)                                 \
  if (on_cuda(context)) {                                                        \
    if ((num_rows) > 0) {                                                        \
      on_stream(context, [&](void* stream) { return cuda::launch_expression; }); \
    }                                                                            \
    return;                                                                      \
  }
#else
#define OPD_ON_CUDA(num_rows, launch_expression) static_cast<void>(context);
#endif

FullDivergenceParams full_piece(const FullDivergenceParams& p, const Pieces& pieces, int64_t piece) {
  FullDivergenceParams part = p;
  const int64_t shared = p.num_shared - piece * pieces.columns;
  part.student = piece_of(p.student, pieces, piece);
  part.num_shared = shared < 0 ? 0 : shared < part.student.num_valid ? shared : part.student.num_valid;
  part.teacher.data = static_cast<char*>(p.teacher.data) + piece * pieces.columns * item_size(p.teacher.dtype);
  return part;
}

int64_t score_size(DType logits) { return logits == DType::kFloat64 ? 8 : 4; }

}  // namespace

void check_supported(const Context& context) {
  if (on_cuda(context)) {
    STD_TORCH_CHECK(!context.is_float64(), context.op,
                    ": float64 runs on the CPU only; cast to float32, bfloat16 or float16, or move the tensors there");
    return;
  }
  STD_TORCH_CHECK(cpu::variant_kernels() != nullptr, context.op, ": OPD_CPU_VARIANT=", cpu::requested_variant(),
                  " is not available here, choose one of ", cpu::available_variants());
}

void check_topk_supported(const Context& context, int64_t k) {
#ifdef OPD_HAS_CUDA_KERNELS
  STD_TORCH_CHECK(!on_cuda(context) || k <= cuda::max_topk(), context.op, ": k must be at most ", cuda::max_topk(),
                  " on CUDA, got ", k);
#endif
  static_cast<void>(context), static_cast<void>(k);
}

Pieces pieces_of(const Context& context, const LogitsView& logits) {
#ifdef OPD_HAS_CUDA_KERNELS
  if (on_cuda(context)) return cuda_pieces(context, logits);
#endif
  static_cast<void>(context);
  return pieces_for_threads(logits);
}

void launch_topk_partials(const Context& context, const TopkPartialsParams& p, const Pieces& pieces) {
  OPD_ON_CUDA(p.logits.num_rows, launch_topk_partials(p, cut(pieces), stream))
  parallel_pieces(p.logits, pieces, [&](int64_t piece, int64_t begin, int64_t end, bool is_last) {
    TopkPartialsParams part = p;
    part.goes_on = !is_last && p.logits.num_rows == 1;
    part.logits = piece_of(p.logits, pieces, piece);
    part.vocab_start_index += piece * pieces.columns;
    part.packed += piece * p.logits.num_rows * p.packed_words;
    cpu::variant_kernels()->topk_partials(part, begin, end);
  });
}

void launch_gather_partials(const Context& context, const GatherPartialsParams& p, const Pieces& pieces) {
  OPD_ON_CUDA(p.logits.num_rows, launch_gather_partials(p, cut(pieces), stream))
  const int64_t num_tokens = p.logits.num_rows, item = score_size(p.logits.dtype);
  const int64_t support_width = p.k + (p.target != nullptr);
  parallel_pieces(p.logits, pieces, [&](int64_t piece, int64_t begin, int64_t end, bool) {
    GatherPartialsParams part = p;
    part.logits = piece_of(p.logits, pieces, piece);
    part.vocab_start_index += piece * pieces.columns;
    part.stats = static_cast<char*>(p.stats) + piece * num_tokens * kNumStats * item;
    part.support_logits = static_cast<char*>(p.support_logits) + piece * num_tokens * support_width * item;
    cpu::variant_kernels()->gather_partials(part, begin, end);
  });
}

void launch_combine_topk(const Context& context, const MergeTopkParams& p, int32_t* combined) {
  OPD_ON_CUDA(p.num_rows, launch_combine_topk(p, combined, stream))
  cpu::combine_topk_partials(p, combined, 0, p.num_rows);
}

void launch_combine_gather(const Context& context, const MergeGatherParams& p) {
  OPD_ON_CUDA(p.num_rows, launch_combine_gather(p, stream))
  cpu::combine_gather_partials(p, 0, p.num_rows);
}

void launch_merge_topk(const Context& context, const MergeTopkParams& p) {
  OPD_ON_CUDA(p.num_rows, launch_merge_topk(p, stream))
  parallel_rows(p.num_rows, 64 * (p.tp_size * p.k + 1),
                [&](int64_t begin, int64_t end) { cpu::merge_topk(p, begin, end); });
}

void launch_merge_gather(const Context& context, const MergeGatherParams& p) {
  OPD_ON_CUDA(p.num_rows, launch_merge_gather(p, stream))
  parallel_rows(p.num_rows, 64 * (p.k + 1), [&](int64_t begin, int64_t end) { cpu::merge_gather(p, begin, end); });
}

void launch_scores_backward(const Context& context, const ScoresBackwardParams& p) {
  const Pieces pieces = pieces_of(context, p.logits);
  OPD_ON_CUDA(p.logits.num_rows, launch_scores_backward(p, cut(pieces), stream))
  parallel_pieces(p.logits, pieces, [&](int64_t piece, int64_t begin, int64_t end, bool) {
    ScoresBackwardParams part = p;
    part.logits = piece_of(p.logits, pieces, piece);
    part.grad = piece_of(p.grad, pieces, piece);
    part.vocab_start_index += piece * pieces.columns;
    cpu::variant_kernels()->scores_backward(part, begin, end);
  });
}

void launch_bucket_divergence(const Context& context, const BucketDivergenceParams& p) {
  OPD_ON_CUDA(p.num_rows, launch_bucket_divergence(p, stream))
  parallel_rows(p.num_rows, 64 * (p.k + 1), [&](int64_t begin, int64_t end) { cpu::bucket_divergence(p, begin, end); });
}

void launch_full_divergence(const Context& context, const FullDivergenceParams& p, const Pieces& pieces) {
  OPD_ON_CUDA(p.student.num_rows, launch_full_divergence(p, cut(pieces), stream))
  const int64_t piece_bytes = p.student.num_rows * 2 * score_size(p.student.dtype);
  parallel_pieces(p.student, pieces, [&](int64_t piece, int64_t begin, int64_t end, bool) {
    FullDivergenceParams part = full_piece(p, pieces, piece);
    part.sums = static_cast<char*>(p.sums) + piece * piece_bytes;
    cpu::variant_kernels()->full_divergence(part, begin, end);
  });
}

void launch_full_divergence_backward(const Context& context, const FullDivergenceParams& p) {
  const Pieces pieces = pieces_of(context, p.student);
  OPD_ON_CUDA(p.student.num_rows, launch_full_divergence_backward(p, cut(pieces), stream))
  parallel_pieces(p.student, pieces, [&](int64_t piece, int64_t begin, int64_t end, bool) {
    FullDivergenceParams part = full_piece(p, pieces, piece);
    part.grad = piece_of(p.grad, pieces, piece);
    cpu::variant_kernels()->full_divergence_backward(part, begin, end);
  });
}

void launch_distill_loss(const Context& context, const DistillLossParams& p) {
  OPD_ON_CUDA(p.logits.num_rows, launch_distill_loss(p, stream))
  parallel_rows(p.logits.num_rows, p.logits.width,
                [&](int64_t begin, int64_t end) { cpu::distill_loss(p, begin, end); });
}

void launch_weigh_upstream(const Context& context, const WeighUpstreamParams& p) {
  OPD_ON_CUDA(p.num_rows, launch_weigh_upstream(p, stream))
  cpu::weigh_upstream(p, 0, p.num_rows);
}

}  // namespace opd::ops
