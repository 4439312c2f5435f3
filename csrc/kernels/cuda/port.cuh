// One spelling for nvcc and for the emulator: launches, dynamic shared memory, half-precision packs, fast exponential.
// Kernel bodies hold no #ifdef; whatever differs between the two worlds is here.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/launchers.h"
#include "kernels/params.h"

#ifdef OPD_EMULATE_CUDA
#include "emulator/cuda_emulator.h"
#define OPD_DYNAMIC_SHARED(name)                          \
  unsigned char* name = reinterpret_cast<unsigned char*>( \
      (reinterpret_cast<uintptr_t>(::cuda_emulator::blk().dyn.data()) + 15) & ~uintptr_t{15})
#define OPD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                         \
  (static_cast<void>(stream),                                                              \
   ::cuda_emulator::launch(dim3(static_cast<unsigned>(grid)), dim3(block), (shared_bytes), \
                           [=] { kernel(__VA_ARGS__); }),                                  \
   0)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define OPD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// clang-format off: it splits <<< and >>>
#define OPD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                   \
  (::opd::cuda::allow_shared(reinterpret_cast<const void*>(kernel), (shared_bytes)),                                 \
   (kernel)<<<static_cast<unsigned>(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))
// clang-format on
#endif

namespace opd::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kInfF = __builtin_huge_valf();

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float nan_f() { return __uint_as_float(0x7fc00000u); }

// Sixteen bytes of a row in registers.
template <class Scalar>
struct alignas(16) Pack {
  static constexpr int kLanes = 16 / static_cast<int>(sizeof(Scalar));
  uint32_t word[4];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ __forceinline__ void unpack(const Pack<float>& pack, float (&z)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = __uint_as_float(pack.word[i]);
}
__device__ __forceinline__ void unpack(const Pack<BFloat16>& pack, float (&z)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    z[2 * i] = __uint_as_float(pack.word[i] << 16);
    z[2 * i + 1] = __uint_as_float(pack.word[i] & 0xffff0000u);
  }
}

#ifdef OPD_EMULATE_CUDA

inline float to_float(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}
template <class Scalar>
Scalar round_to(float value);
template <>
inline float round_to<float>(float value) {
  return value;
}
template <>
inline BFloat16 round_to<BFloat16>(float value) {  // to nearest even; NaN stays NaN
  const unsigned bits = __float_as_uint(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fffu : rounded)};
}
template <>
inline Float16 round_to<Float16>(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  Float16 rounded;
  std::memcpy(&rounded.bits, &half, 2);
  return rounded;
}
inline void unpack(const Pack<Float16>& pack, float (&z)[8]) {
  for (int i = 0; i < 8; ++i) z[i] = to_float(Float16{static_cast<uint16_t>(pack.word[i / 2] >> (i % 2 * 16))});
}
template <class Scalar>
Pack<Scalar> round_pack(const float (&z)[Pack<Scalar>::kLanes]) {
  Pack<Scalar> pack;
  for (int i = 0; i < Pack<Scalar>::kLanes; ++i) {
    const Scalar rounded = round_to<Scalar>(z[i]);
    std::memcpy(reinterpret_cast<char*>(&pack) + i * sizeof(Scalar), &rounded, sizeof(Scalar));
  }
  return pack;
}
// The largest lane; NaN where one is NaN.
template <class Scalar>
float pack_max(const Pack<Scalar>& pack) {
  float z[Pack<Scalar>::kLanes], best = -kInfF;
  unpack(pack, z);
  for (const float value : z) best = value > best || value != value ? value : best;
  return best;
}
// 2^y, 0 below the normal range.
inline float exp2_flush(float y) { return y < -126.0f ? 0.0f : std::exp2(y); }
template <class Scalar>
Pack<Scalar> load_once(const Pack<Scalar>* from) {
  return *from;
}

#else

// More than 48 KB of dynamic shared memory must be asked for; a failure shows at the launch.
inline void allow_shared(const void* kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class Scalar>
__device__ __forceinline__ Scalar round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 round_to<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ Float16 round_to<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
__device__ __forceinline__ void unpack(const Pack<Float16>& pack, float (&z)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pack.word[i]));
    z[2 * i] = pair.x;
    z[2 * i + 1] = pair.y;
  }
}
template <class Scalar>
__device__ __forceinline__ Pack<Scalar> round_pack(const float (&z)[Pack<Scalar>::kLanes]);
template <>
__device__ __forceinline__ Pack<float> round_pack<float>(const float (&z)[4]) {
  Pack<float> pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) pack.word[i] = __float_as_uint(z[i]);
  return pack;
}
template <>
__device__ __forceinline__ Pack<BFloat16> round_pack<BFloat16>(const float (&z)[8]) {
  Pack<BFloat16> pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(z[2 * i], z[2 * i + 1]);
    pack.word[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return pack;
}
template <>
__device__ __forceinline__ Pack<Float16> round_pack<Float16>(const float (&z)[8]) {
  Pack<Float16> pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(z[2 * i], z[2 * i + 1]);
    pack.word[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return pack;
}
// The largest lane; NaN where one is NaN. Half precision compares two lanes an instruction.
__device__ __forceinline__ float max_nan(float a, float b) {
  float best;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(best) : "f"(a), "f"(b));
  return best;
}
__device__ __forceinline__ float pack_max(const Pack<float>& pack) {
  return max_nan(max_nan(__uint_as_float(pack.word[0]), __uint_as_float(pack.word[1])),
                 max_nan(__uint_as_float(pack.word[2]), __uint_as_float(pack.word[3])));
}
template <class Pair>
__device__ __forceinline__ Pair max_of_pairs(const uint32_t (&word)[4]) {
  const Pair* pair = reinterpret_cast<const Pair*>(word);
  return __hmax2_nan(__hmax2_nan(pair[0], pair[1]), __hmax2_nan(pair[2], pair[3]));
}
__device__ __forceinline__ float pack_max(const Pack<BFloat16>& pack) {
  const float2 pair = __bfloat1622float2(max_of_pairs<__nv_bfloat162>(pack.word));
  return max_nan(pair.x, pair.y);
}
__device__ __forceinline__ float pack_max(const Pack<Float16>& pack) {
  const float2 pair = __half22float2(max_of_pairs<__half2>(pack.word));
  return max_nan(pair.x, pair.y);
}
// 2^y, 0 below the normal range: one instruction.
__device__ __forceinline__ float exp2_flush(float y) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
}
// Read-only data that no one else will want from the first-level cache.
template <class Scalar>
__device__ __forceinline__ Pack<Scalar> load_once(const Pack<Scalar>* from) {
  Pack<Scalar> pack;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(pack.word[0]), "=r"(pack.word[1]), "=r"(pack.word[2]), "=r"(pack.word[3])
      : "l"(from));
  return pack;
}

#endif

// A row (or piece of a row) as aligned 16-byte packs and ragged ends: rows of odd width start anywhere.
template <class Scalar>
struct RowSpan {
  using Element = std::remove_const_t<Scalar>;
  using Line = std::conditional_t<std::is_const_v<Scalar>, const Pack<Element>, Pack<Element>>;
  static constexpr int kLanes = Pack<Element>::kLanes;
  Scalar* row;
  int count, head, packs;

  __device__ RowSpan(Scalar* pointer, int64_t columns) : row(pointer), count(static_cast<int>(columns)) {
    const int misaligned =
        static_cast<int>(reinterpret_cast<uintptr_t>(pointer) & 15) / static_cast<int>(sizeof(Scalar));
    head = misaligned == 0 ? 0 : kLanes - misaligned;
    head = head < count ? head : count;
    packs = (count - head) / kLanes;
  }
  __device__ int num_ragged() const { return count - packs * kLanes; }
  __device__ int ragged_column(int i) const { return i < head ? i : i + packs * kLanes; }
  __device__ int pack_column(int i) const { return head + i * kLanes; }
  __device__ Line* at(int i) const { return reinterpret_cast<Line*>(row + head) + i; }
};

// Calls visit(i, pack) for the packs of this thread, several loads in flight before the first is used.
template <class Scalar, class Visit>
__device__ __forceinline__ void for_each_pack(const RowSpan<const Scalar>& span, const Visit& visit) {
  constexpr int kInFlight = 4;
  const int stride = static_cast<int>(blockDim.x);
  int i = static_cast<int>(threadIdx.x);
  for (; i + (kInFlight - 1) * stride < span.packs; i += kInFlight * stride) {
    Pack<Scalar> pack[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) pack[j] = load_once(span.at(i + j * stride));
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) visit(i + j * stride, pack[j]);
  }
  for (; i < span.packs; i += stride) visit(i, load_once(span.at(i)));
}

// Shared memory for a type with a constructor, which __shared__ variables may not run.
template <class T, int kCount>
struct SharedArray {
  alignas(16) unsigned char bytes[kCount * sizeof(T)];
  __device__ T* get() { return reinterpret_cast<T*>(bytes); }
};

// body(element) for the logits' dtype, a cudaError_t; float64 was refused by the op.
template <class Body>
int with_scalar(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      break;  // refused by the op
  }
  return 1;
}

}  // namespace opd::cuda
