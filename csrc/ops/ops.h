// The ops, one function each, whatever the device. Signatures are those of schema.cpp; see opd_engine/ops/__init__.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace opd::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor topk_partials(Tensor logits, int64_t k, OptionalTensor target, int64_t vocab_start_index, int64_t vocab_size,
                     double temperature, OptionalTensor row_temperature);
SixTensors merge_topk(Tensor packed, int64_t k, OptionalTensor target, int64_t vocab_size, double temperature,
                      OptionalTensor row_temperature);
SixTensors topk_log_probs(Tensor logits, int64_t k, OptionalTensor target, int64_t vocab_size, double temperature,
                          OptionalTensor row_temperature);
std::tuple<Tensor, Tensor> gather_partials(Tensor logits, Tensor indices, OptionalTensor target,
                                           int64_t vocab_start_index, int64_t vocab_size, double temperature,
                                           OptionalTensor row_temperature);
SixTensors merge_gather(Tensor stats, Tensor support_logits, Tensor indices, OptionalTensor target, int64_t vocab_size,
                        double temperature, OptionalTensor row_temperature);
SixTensors gather_log_probs(Tensor logits, Tensor indices, OptionalTensor target, int64_t vocab_size,
                            double temperature, OptionalTensor row_temperature);
Tensor scores_backward(Tensor logits, Tensor indices, OptionalTensor target, Tensor stats, Tensor upstream,
                       int64_t vocab_start_index, int64_t vocab_size, double temperature,
                       OptionalTensor row_temperature);
void scores_backward_(Tensor logits, Tensor indices, OptionalTensor target, Tensor stats, Tensor upstream,
                      int64_t vocab_start_index, int64_t vocab_size, double temperature,
                      OptionalTensor row_temperature);
std::tuple<Tensor, Tensor, Tensor> bucket_divergence(Tensor indices, Tensor student_log_probs, Tensor student_tail,
                                                     Tensor teacher_log_probs, Tensor teacher_tail,
                                                     std::string divergence, double beta, double alpha,
                                                     std::string tail, std::optional<double> teacher_log_prob_min);
Tensor full_divergence(Tensor student_logits, Tensor teacher_logits, Tensor student_stats, Tensor teacher_stats,
                       int64_t vocab_start_index, int64_t vocab_size, int64_t teacher_vocab_size,
                       std::string divergence, double beta, double alpha, double temperature,
                       OptionalTensor row_temperature);
Tensor full_divergence_backward(Tensor student_logits, Tensor teacher_logits, Tensor student_stats,
                                Tensor teacher_stats, int64_t vocab_start_index, int64_t vocab_size,
                                int64_t teacher_vocab_size, std::string divergence, double beta, double alpha,
                                double temperature, OptionalTensor row_temperature, Tensor sums, Tensor grad_loss);
void full_divergence_backward_(Tensor student_logits, Tensor teacher_logits, Tensor student_stats, Tensor teacher_stats,
                               int64_t vocab_start_index, int64_t vocab_size, int64_t teacher_vocab_size,
                               std::string divergence, double beta, double alpha, double temperature,
                               OptionalTensor row_temperature, Tensor sums, Tensor grad_loss);
Tensor distill_loss_(Tensor logits, Tensor indices, Tensor teacher_log_probs, Tensor teacher_tail, Tensor weights,
                     std::string divergence, double beta, double alpha, std::string tail,
                     std::optional<double> teacher_log_prob_min, int64_t vocab_size, double temperature,
                     OptionalTensor row_temperature);

}  // namespace opd::ops
