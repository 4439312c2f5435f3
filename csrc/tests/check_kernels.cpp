// Holds the CPU kernels of one processor to a plain double-precision reference, without torch or Python: what a
// cross-compiled build (NEON under an emulator) is checked with. Prints one line a check; exits 1 if any fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace {

using opd::DType;

constexpr double kInf = std::numeric_limits<double>::infinity();
int failures = 0;

void expect(const char* what, double error, double tolerance) {
  const bool ok = error <= tolerance;  // NaN fails
  failures += !ok;
  std::printf("%-44s error %9.2e  tolerance %7.0e  %s\n", what, error, tolerance, ok ? "ok" : "FAILED");
}

uint32_t random_state = 12345;
double uniform() {
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) / 16777216.0;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Reference {
  std::vector<double> log_q, probability;
  double lse, entropy, tail;
};

Reference reference_of(const std::vector<double>& z, double t, const std::vector<int64_t>& support) {
  Reference r{std::vector<double>(z.size()), std::vector<double>(z.size()), 0, 0, 0};
  const double max = *std::max_element(z.begin(), z.end());
  long double sum = 0, tail = 0, entropy = 0;  // a naive double sum would be the larger error
  for (const double x : z) sum += std::exp((x - max) / t);
  std::vector<bool> on_support(z.size(), false);
  for (const int64_t id : support) on_support[id] = true;
  for (size_t v = 0; v < z.size(); ++v) {
    r.log_q[v] = (z[v] - max) / t - std::log(static_cast<double>(sum));
    r.probability[v] = std::exp(r.log_q[v]);
    if (r.probability[v] > 0) entropy -= static_cast<long double>(r.probability[v]) * r.log_q[v];
    if (!on_support[v]) tail += r.probability[v];
  }
  r.entropy = static_cast<double>(entropy);
  r.lse = max / t + std::log(static_cast<double>(sum));
  r.tail = std::log(static_cast<double>(tail));
  return r;
}

template <class Stored, class Score>
void check_dtype(const char* name, DType dtype, double tolerance, double gradient_tolerance) {
  constexpr int64_t kVocab = 10'007, kSupport = 37;
  constexpr double kTemperature = 0.7;
  std::vector<Stored> logits(kVocab);
  std::vector<double> z(kVocab);
  for (int64_t v = 0; v < kVocab; ++v) {
    const double value = v % 11 == 3 ? -kInf : 12 * uniform() - 6;
    if constexpr (sizeof(Stored) == 2) {
      logits[v] = to_bfloat16(static_cast<float>(value));
      z[v] = from_bfloat16(logits[v]);
    } else {
      logits[v] = static_cast<Stored>(value);
      z[v] = logits[v];
    }
  }
  std::vector<int64_t> order(kVocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z[a] > z[b]; });
  const std::vector<int64_t> top(order.begin(), order.begin() + kSupport);
  const Reference r = reference_of(z, kTemperature, top);

  opd::LogitsView view{};
  view.data = logits.data();
  view.dtype = dtype;
  view.num_rows = 1;
  view.width = view.num_valid = kVocab;
  const opd::Temperature temperature{kTemperature, nullptr, false};
  const bool is_float64 = sizeof(Score) == 8;
  const opd::cpu::VariantKernels* kernels = opd::cpu::variant_kernels();

  const int64_t words = (kSupport + opd::kNumStats) * (is_float64 ? 2 : 1) + kSupport;
  std::vector<int32_t> packed(words);
  kernels->topk_partials({view, temperature, kSupport, 0, kVocab, nullptr, packed.data(), words}, 0, 1);
  std::vector<int64_t> ids(kSupport);
  std::vector<Score> log_probs(kSupport), stats(opd::kNumStats), support(kSupport), merged(opd::kNumStats);
  Score tail, lse, entropy, target;
  opd::cpu::merge_topk({packed.data(), words, 1, 1, kSupport, kVocab, is_float64, temperature, nullptr, ids.data(),
                        log_probs.data(), &tail, &lse, &entropy, &target},
                       0, 1);
  char label[96];
  const auto expect_named = [&](const char* what, double error, double allowed) {
    std::snprintf(label, sizeof(label), "%s %s", name, what);
    expect(label, error, allowed);
  };
  double worst = 0;
  for (int64_t j = 0; j < kSupport; ++j) worst = std::max(worst, std::fabs(log_probs[j] - r.log_q[top[j]]));
  expect_named("top-k ids", ids == top ? 0 : 1, 0);
  expect_named("top-k log-probs", worst, tolerance);
  expect_named("top-k tail", std::fabs(tail - r.tail), tolerance);
  expect_named("entropy", std::fabs(entropy - r.entropy), tolerance);
  expect_named("lse", std::fabs(lse - r.lse), tolerance);

  kernels->gather_partials({view, temperature, kSupport, 0, kVocab, ids.data(), nullptr, stats.data(), support.data()},
                           0, 1);
  opd::cpu::merge_gather({stats.data(), support.data(), 1, 1, kSupport, kVocab, is_float64, temperature, ids.data(),
                          nullptr, log_probs.data(), &tail, &lse, &entropy, &target, merged.data()},
                         0, 1);
  expect_named("gather tail", std::fabs(tail - r.tail), tolerance);

  // d = (forward KL to a uniform teacher on the support, tail 0.3, entropy 0.2): docs/math.md, the one backward.
  std::vector<Score> upstream(kSupport + 4, static_cast<Score>(-0.5 / kSupport));
  upstream[kSupport] = static_cast<Score>(0.3);
  upstream[kSupport + 1] = upstream[kSupport + 3] = 0;
  upstream[kSupport + 2] = static_cast<Score>(0.2);
  std::vector<Stored> gradient(kVocab);
  opd::LogitsView gradient_view = view;
  gradient_view.data = gradient.data();
  kernels->scores_backward(
      {view, gradient_view, temperature, kSupport, 0, kVocab, ids.data(), nullptr, merged.data(), upstream.data()}, 0,
      1);
  std::vector<double> expected(kVocab);
  double total = upstream[kSupport];
  for (int64_t j = 0; j < kSupport; ++j) total += upstream[j];
  for (int64_t v = 0; v < kVocab; ++v) {
    const double q = r.probability[v];
    expected[v] = -q * total + upstream[kSupport] * std::exp(r.log_q[v] - r.tail);
    if (q > 0) expected[v] -= upstream[kSupport + 2] * q * (r.log_q[v] + r.entropy);
  }
  for (int64_t j = 0; j < kSupport; ++j) {
    const double q = r.probability[top[j]];
    expected[top[j]] = -q * total + upstream[j] - upstream[kSupport + 2] * q * (r.log_q[top[j]] + r.entropy);
  }
  worst = 0;
  for (int64_t v = 0; v < kVocab; ++v) {
    double got;
    if constexpr (sizeof(Stored) == 2) {
      got = from_bfloat16(gradient[v]);
    } else {
      got = gradient[v];
    }
    worst = std::max(worst, std::fabs(got - expected[v] / kTemperature));
  }
  expect_named("gradient", worst, gradient_tolerance);

  // Full vocabulary against the reversed row: every divergence once.
  std::vector<Stored> teacher(logits.rbegin(), logits.rend());
  std::vector<double> teacher_z(z.rbegin(), z.rend());
  for (int64_t v = 0; v < kVocab; ++v) {  // same support of finite logits on both sides
    if (z[v] == -kInf || teacher_z[v] == -kInf) teacher[v] = logits[v], teacher_z[v] = z[v];
  }
  const Reference p = reference_of(teacher_z, kTemperature, {});
  opd::LogitsView teacher_view = view;
  teacher_view.data = teacher.data();
  std::vector<Score> teacher_stats(opd::kNumStats), sums(2);
  kernels->gather_partials({teacher_view, temperature, 0, 0, kVocab, nullptr, nullptr, teacher_stats.data(), nullptr},
                           0, 1);
  const opd::Divergence kinds[] = {opd::Divergence::kForwardKL, opd::Divergence::kReverseKL, opd::Divergence::kJSD};
  for (const opd::Divergence kind : kinds) {
    opd::FullDivergenceParams full{};
    full.student = view;
    full.teacher = teacher_view;
    full.temperature = temperature;
    full.divergence = {kind, 0.3};
    full.num_shared = kVocab;
    full.student_stats = merged.data();
    full.teacher_stats = teacher_stats.data();
    full.sums = sums.data();
    kernels->full_divergence(full, 0, 1);
    double loss = 0;
    for (int64_t v = 0; v < kVocab; ++v) {
      const double q = r.probability[v], pv = p.probability[v], m = 0.3 * pv + 0.7 * q;
      if (kind == opd::Divergence::kForwardKL && pv > 0) loss += pv * (p.log_q[v] - r.log_q[v]);
      if (kind == opd::Divergence::kReverseKL && q > 0) loss += q * (r.log_q[v] - p.log_q[v]);
      if (kind == opd::Divergence::kJSD && m > 0) {
        if (pv > 0) loss += 0.3 * pv * std::log(pv / m);
        if (q > 0) loss += 0.7 * q * std::log(q / m);
      }
    }
    const char* names[] = {"full forward_kl", "full reverse_kl", "full jsd"};
    expect_named(names[static_cast<int>(kind)], std::fabs(sums[0] - loss), 10 * tolerance);
  }
}

}  // namespace

int main() {
  const opd::cpu::VariantKernels* kernels = opd::cpu::variant_kernels();
  if (kernels == nullptr) {
    std::printf("OPD_CPU_VARIANT=%s is not one of %s\n", opd::cpu::requested_variant(), opd::cpu::available_variants());
    return 2;
  }
  std::printf("variant %s\n", kernels->name);
  check_dtype<double, double>("float64", DType::kFloat64, 2e-14, 1e-15);
  check_dtype<float, float>("float32", DType::kFloat32, 2e-6, 1e-7);
  check_dtype<uint16_t, float>("bfloat16", DType::kBFloat16, 2e-6, 1e-3);
  std::printf("%s\n", failures == 0 ? "all kernels agree with the reference" : "FAILED");
  return failures == 0 ? 0 : 1;
}
