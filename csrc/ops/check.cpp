// Argument checks shared by the ops. Every message names the op, the argument, what was wanted and what came.
#include "ops/check.h"

#include <algorithm>
#include <array>

#include "ops/launch.h"

namespace opd::ops {

namespace {

std::string describe(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype number " + std::to_string(static_cast<int>(dtype));
  }
}

template <class Sizes>
std::string describe_sizes(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + (size < 0 ? "*" : std::to_string(size));
  return text + "]";
}

DType logits_dtype(const char* op, const char* name, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float64, float32, bfloat16 or float16, got ",
                      describe(logits.scalar_type()));
  }
  return DType::kFloat32;
}

}  // namespace

Tensor Context::empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
  // Not new_empty: looked up by its name at every call it takes a microsecond longer, and a single row has eight.
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes.begin()[dim], 1);
  }
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like->get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                                                  static_cast<int32_t>(dtype), device, like->get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

Context context_of(const char* op, const Tensor& logits) {
  const DType dtype = logits_dtype(op, "logits", logits);
  const Context context{op, dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float, &logits};
  check_supported(context);
  return context;
}

Context context_of_scores(const char* op, const char* name, const Tensor& scores) {
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Double || scores.scalar_type() == ScalarType::Float, op, ": ",
                  name, " must be float64 or float32, got ", describe(scores.scalar_type()));
  const Context context{op, scores.scalar_type(), &scores};
  check_supported(context);
  return context;
}

LogitsView view_of(const Context& context, const char* name, const Tensor& logits, int64_t vocab_start_index,
                   int64_t vocab_size) {
  const int64_t dims = logits.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= kMaxLeadingDims + 1, context.op, ": ", name, " must have 1 to ",
                  kMaxLeadingDims + 1, " dimensions, [*, vocab], got ", dims);
  STD_TORCH_CHECK(logits.size(dims - 1) <= 1 || logits.stride(dims - 1) == 1, context.op, ": ", name,
                  " must have contiguous columns (last stride 1), got last stride ", logits.stride(dims - 1));
  STD_TORCH_CHECK(vocab_size >= 1, context.op, ": vocab_size must be at least 1, got ", vocab_size);
  STD_TORCH_CHECK(vocab_start_index >= 0, context.op, ": vocab_start_index must not be negative, got ",
                  vocab_start_index);
  STD_TORCH_CHECK(
      logits.get_device_index() == context.like->get_device_index() && logits.is_cpu() == context.like->is_cpu(),
      context.op, ": ", name, " must be on the device of the other arguments");
  LogitsView view{};
  view.data = logits.data_ptr();
  view.dtype = logits_dtype(context.op, name, logits);
  view.num_rows = 1;
  view.num_leading_dims = static_cast<int>(dims - 1);
  for (int64_t dim = 0; dim < dims - 1; ++dim) {
    view.sizes[dim] = logits.size(dim);
    view.strides[dim] = logits.stride(dim);
    view.num_rows *= logits.size(dim);
  }
  view.width = logits.size(dims - 1);
  const int64_t left = vocab_size - vocab_start_index;
  view.num_valid = left < 0 ? 0 : left < view.width ? left : view.width;
  return view;
}

void check_tensor(const Context& context, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, context.op, ": ", name, " must be ", describe(dtype), ", got ",
                  describe(tensor.scalar_type()));
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    same = same && (size < 0 || tensor.size(dim) == size);
    ++dim;
  }
  STD_TORCH_CHECK(same, context.op, ": ", name, " must have shape ", describe_sizes(sizes), ", got ",
                  describe_sizes(tensor.sizes()));
  STD_TORCH_CHECK(tensor.is_contiguous(), context.op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(
      tensor.get_device_index() == context.like->get_device_index() && tensor.is_cpu() == context.like->is_cpu(),
      context.op, ": ", name, " must be on the device of the other arguments");
}

void check_scores(const Context& context, const char* name, const Tensor& tensor,
                  std::initializer_list<int64_t> sizes) {
  check_tensor(context, name, tensor, context.score, sizes);
}

const int64_t* target_pointer(const Context& context, const std::optional<Tensor>& target, int64_t num_tokens) {
  if (!target.has_value()) return nullptr;
  check_tensor(context, "target", *target, ScalarType::Long, {num_tokens});
  // T = 0: an empty tensor may have no storage, but a target was given.
  static const int64_t kNone = kAbsent;
  const void* data = target->data_ptr();
  return data == nullptr ? &kNone : static_cast<const int64_t*>(data);
}

Temperature temperature_of(const Context& context, double temperature, const std::optional<Tensor>& row_temperature,
                           int64_t num_tokens) {
  if (!row_temperature.has_value()) {
    STD_TORCH_CHECK(temperature > 0 && temperature <= 1.7976931348623157e308, context.op,
                    ": temperature must be finite and > 0, got ", temperature);
    return {temperature, nullptr, false};
  }
  const ScalarType dtype = row_temperature->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float, context.op,
                  ": row_temperature must be float32 or float64, got ", describe(dtype));
  check_tensor(context, "row_temperature", *row_temperature, dtype, {num_tokens});
  const Temperature rows{temperature, row_temperature->data_ptr(), dtype == ScalarType::Double};
  for (int64_t row = 0; row_temperature->is_cpu() && row < num_tokens; ++row) {
    const double t = opd::temperature_of(rows, row);
    STD_TORCH_CHECK(t > 0 && t <= 1.7976931348623157e308, context.op,
                    ": temperature must be finite and > 0 in every row, got ", t, " in row ", row);
  }
  return rows;
}

DivergenceSpec parse_divergence(const Context& context, const std::string& divergence, double beta, double alpha) {
  const auto check = [&](bool in_range, const char* name, const char* range, double value) {
    STD_TORCH_CHECK(in_range, context.op, ": ", name, " must be in ", range, ", got ", value);
  };
  if (divergence == "forward_kl") return {Divergence::kForwardKL, 0};
  if (divergence == "reverse_kl") return {Divergence::kReverseKL, 0};
  if (divergence == "jsd") {
    check(beta >= 0 && beta <= 1, "beta", "[0, 1]", beta);
    if (beta == 0) return {Divergence::kForwardKL, 0};  // by convention, not as a limit
    if (beta == 1) return {Divergence::kReverseKL, 0};
    return {Divergence::kJSD, beta};
  }
  const bool is_forward = divergence == "skew_forward_kl";
  STD_TORCH_CHECK(is_forward || divergence == "skew_reverse_kl", context.op,
                  ": divergence must be forward_kl, reverse_kl, jsd, skew_forward_kl or skew_reverse_kl, got '",
                  divergence, "'");
  check(alpha >= 0 && alpha < 1, "alpha", "[0, 1)", alpha);
  if (alpha == 0) return {is_forward ? Divergence::kForwardKL : Divergence::kReverseKL, 0};
  return {is_forward ? Divergence::kSkewForwardKL : Divergence::kSkewReverseKL, alpha};
}

TailMode parse_tail(const Context& context, const std::string& tail) {
  if (tail == "bucket") return TailMode::kBucket;
  if (tail == "truncate") return TailMode::kTruncate;
  STD_TORCH_CHECK(tail == "renormalize", context.op, ": tail must be bucket, truncate or renormalize, got '", tail,
                  "'");
  return TailMode::kRenormalize;
}

}  // namespace opd::ops
