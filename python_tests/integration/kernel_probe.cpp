// Runs the vocabulary-sized CPU kernels of one variant on fixed inputs and prints what they wrote, one op a line:
// lets a test compare instruction sets, another architecture's under emulation included. No torch.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace opd::cpu::OPD_CPU_VARIANT {
extern const VariantKernels kKernels;
}

namespace {

using opd::DType;

constexpr int64_t kRows = 5, kWidth = 1003, kSupport = 7, kVocab = 1000;
constexpr int64_t kTopkWords = 2 * (kSupport + 5) + kSupport;

// Multiples of 1/8 in [-16, 16): exact in every dtype, with ties.
double input(int64_t row, int64_t column, uint32_t seed) {
  uint32_t state = static_cast<uint32_t>(row * 7919 + column) * 2654435761u + seed;
  state ^= state >> 15;
  state *= 2246822519u;
  state ^= state >> 13;
  return (static_cast<int>(state % 256) - 128) / 8.0;
}

void store(DType dtype, void* data, int64_t index, double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  if (dtype == DType::kFloat64) static_cast<double*>(data)[index] = value;
  if (dtype == DType::kFloat32) static_cast<float*>(data)[index] = narrow;
  if (dtype == DType::kBFloat16) static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kFloat16) {
    const uint32_t exponent = (bits >> 23) & 255, sign = (bits >> 16) & 0x8000;
    const uint32_t half = value == 0 ? 0 : ((exponent - 112) << 10) | ((bits >> 13) & 1023);
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(sign | half);
  }
}

double load(DType dtype, const void* data, int64_t index) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(data)[index];
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint32_t raw = static_cast<const uint16_t*>(data)[index];
  if (dtype == DType::kFloat16) {
    const double fraction = raw & 1023, exponent = (raw >> 10) & 31;
    const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, int(exponent) - 25);
    return raw & 0x8000 ? -size : size;
  }
  const uint32_t bits = raw << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void print(const char* op, DType logits, DType dtype, const std::vector<double>& storage, int64_t count) {
  std::printf("%s %d", op, static_cast<int>(logits));
  for (int64_t i = 0; i < count; ++i) std::printf(" %.17g", load(dtype, storage.data(), i));
  std::printf("\n");
}

opd::LogitsView view(DType dtype, std::vector<double>& storage) {
  opd::LogitsView logits{};
  logits.data = storage.data();
  logits.dtype = dtype;
  logits.num_rows = logits.sizes[0] = kRows;
  logits.num_leading_dims = 1;
  logits.strides[0] = logits.width = kWidth;
  logits.num_valid = kVocab;
  return logits;
}

void fill(DType dtype, std::vector<double>& storage, uint32_t seed) {
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t column = 0; column < kWidth; ++column)
      store(dtype, storage.data(), row * kWidth + column, input(row, column, seed));
}

void probe(DType dtype) {
  const auto& kernels = opd::cpu::OPD_CPU_VARIANT::kKernels;
  const DType score = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const opd::Temperature temperature{0.7, nullptr, false};
  std::vector<double> logits(kRows * kWidth), teacher(kRows * kWidth), grad(kRows * kWidth);
  fill(dtype, logits, 1);
  fill(dtype, teacher, 2);
  std::vector<int64_t> indices(kRows * kSupport);
  for (int64_t i = 0; i < kRows * kSupport; ++i) indices[i] = i % kSupport == 3 ? -1 : (i * 137) % kVocab;

  std::vector<int32_t> packed(kRows * kTopkWords);
  opd::TopkPartialsParams topk{view(dtype, logits), temperature, kSupport, 0, kVocab, nullptr, packed.data(), 0};
  const int words = score == DType::kFloat64 ? 2 : 1;
  topk.packed_words = words * (kSupport + 5) + kSupport;
  kernels.topk_partials(topk, 0, kRows);
  std::printf("topk %d", static_cast<int>(dtype));
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t i = 0; i < kSupport + 5 + kSupport; ++i) {
      const int32_t* start = packed.data() + row * topk.packed_words;
      const bool is_id = i >= kSupport + 5;
      std::printf(" %.17g", is_id ? start[words * (kSupport + 5) + i - kSupport - 5] : load(score, start, i));
    }
  std::printf("\n");

  std::vector<double> stats(kRows * 5), teacher_stats(kRows * 5), support(kRows * kSupport);
  opd::GatherPartialsParams gather{view(dtype, logits), temperature,   kSupport, 0, kVocab, indices.data(), nullptr,
                                   stats.data(),        support.data()};
  kernels.gather_partials(gather, 0, kRows);
  print("stats", dtype, score, stats, kRows * 5);
  print("support", dtype, score, support, kRows * kSupport);

  std::vector<double> upstream(kRows * (kSupport + 4));
  for (int64_t i = 0; i < kRows * (kSupport + 4); ++i) store(score, upstream.data(), i, input(i, 3, 5) / 16);
  opd::ScoresBackwardParams backward{view(dtype, logits), view(dtype, grad), temperature,  kSupport,       0, kVocab,
                                     indices.data(),      nullptr,           stats.data(), upstream.data()};
  kernels.scores_backward(backward, 0, kRows);
  print("backward", dtype, dtype, grad, kRows * kWidth);

  gather.k = 0;
  gather.stats = stats.data();
  kernels.gather_partials(gather, 0, kRows);
  gather.logits = view(dtype, teacher);
  gather.stats = teacher_stats.data();
  kernels.gather_partials(gather, 0, kRows);
  for (int kind = 0; kind < 5; ++kind) {
    std::vector<double> sums(kRows * 2), ones(kRows);
    for (int64_t row = 0; row < kRows; ++row) store(score, ones.data(), row, 1.0);
    opd::FullDivergenceParams full{};
    full.student = view(dtype, logits);
    full.teacher = view(dtype, teacher);
    full.temperature = temperature;
    full.divergence = {static_cast<opd::Divergence>(kind), 0.3};
    full.num_shared = kVocab;
    full.student_stats = stats.data();
    full.teacher_stats = teacher_stats.data();
    full.sums = sums.data();
    full.grad_loss = ones.data();
    full.grad = view(dtype, grad);
    kernels.full_divergence(full, 0, kRows);
    print("full", dtype, score, sums, kRows * 2);
    kernels.full_divergence_backward(full, 0, kRows);
    print("full_backward", dtype, dtype, grad, kRows * kWidth);
  }
}

}  // namespace

int main() {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) probe(dtype);
}
