// What every op does before it launches: check arguments, describe the logits, pick the score dtype.
// CHECK_SHAPE(indices, num_tokens, k);  // is check and documentation on one line
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "kernels/params.h"

namespace opd::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An op's name and the score dtype and device its arguments must share.
struct Context {
  const char* op;
  ScalarType score;
  const Tensor* like;

  bool is_float64() const { return score == ScalarType::Double; }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const;
  Tensor empty_scores(std::initializer_list<int64_t> sizes) const { return empty(sizes, score); }
};

// logits: [*, vocab_shard_size], any leading strides, contiguous columns.
Context context_of(const char* op, const Tensor& logits);
Context context_of_scores(const char* op, const char* name, const Tensor& scores);
LogitsView view_of(const Context& context, const char* name, const Tensor& logits, int64_t vocab_start_index,
                   int64_t vocab_size);

// Contiguous, on the same device, of this dtype and shape; -1 in `sizes` matches anything.
void check_tensor(const Context& context, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> sizes);
void check_scores(const Context& context, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes);

// [T] int64 or none.
const int64_t* target_pointer(const Context& context, const std::optional<Tensor>& target, int64_t num_tokens);
Temperature temperature_of(const Context& context, double temperature, const std::optional<Tensor>& row_temperature,
                           int64_t num_tokens);
DivergenceSpec parse_divergence(const Context& context, const std::string& divergence, double beta, double alpha);
TailMode parse_tail(const Context& context, const std::string& tail);

// Runs body(begin, end) over rows on torch's intra-op pool; a thread takes at least about 32k columns.
template <class Body>
void parallel_rows(int64_t num_rows, int64_t columns, const Body& body) {
  if (num_rows == 0) return;
  const int64_t grain = columns >= 32768 ? 1 : 32768 / (columns < 1 ? 1 : columns);
  torch::stable::parallel_for(0, num_rows, grain, body);
}

}  // namespace opd::ops
