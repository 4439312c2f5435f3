// A fresh gradient of hundreds of megabytes costs more in page faults than in arithmetic: ask for huge pages first.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace opd::ops {

// Uninitialised, contiguous, of the logits' shape and dtype.
torch::stable::Tensor new_gradient(const torch::stable::Tensor& logits);

}  // namespace opd::ops
