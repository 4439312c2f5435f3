// Runs CUDA kernel bodies on the CPU, one fiber a CUDA thread, so that every test run executes the code nvcc compiles.
// A block runs on one OS thread (function-local __shared__ becomes static thread_local); blocks are spread over OS
// threads. Finds missing barriers (shuffled schedules), barrier divergence and lanes outside their mask; dynamic shared
// memory starts as NaN. Knows no inline PTX, asynchronous copies, wgmma or clusters; a warp is not in lockstep.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __constant__ static const
#define __shared__ static thread_local
#define __align__(n) alignas(n)
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
namespace cuda_emulator {
struct Fiber;
#if defined(__x86_64__)
// Save callee-saved registers, swap stacks, restore. `naked` keeps the compiler out.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*to*/) {
  __asm__ volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif
struct WarpGroup {  // one per (warp, mask): double-buffered exchange slots
  unsigned mask = 0, arrived = 0, phase = 0;
  uint64_t slot[2][32];
};
struct Fiber {
  uint3 tid{};
  unsigned linear = 0, lane = 0, warp = 0;
  bool done = false;
  const char* waiting = nullptr;
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t ctx;
#endif
};
struct Block {
  dim3 grid, block;
  uint3 bid{};
  unsigned nthreads = 0, live = 0, arrived = 0;
  int pred_acc[3] = {0, 1, 0};  // or / and / count for __syncthreads_{or,and,count}
  int pred_res[2][3] = {};
  unsigned phase = 0;
  std::vector<Fiber> fibers;
  std::vector<std::vector<WarpGroup>> warps;
  std::vector<Fiber*> ready;  // ring buffer
  size_t head = 0, count = 0;
  std::vector<Fiber*> at_barrier;
  std::unique_ptr<char[]> stacks;
  size_t stack_bytes = 0, nstacks = 0;
  std::vector<uint64_t> dyn;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  uint64_t rng = 0;
#if defined(__x86_64__)
  void* main_sp = nullptr;
#else
  ucontext_t main_ctx;
#endif
  void push(Fiber* f) { ready[(head + count++) % ready.size()] = f; }
  Fiber* pop() {
    if (rng && count > 1) {  // shuffled schedule: swap a random entry to the head
      rng ^= rng << 13;
      rng ^= rng >> 7;
      rng ^= rng << 17;
      std::swap(ready[head], ready[(head + rng % count) % ready.size()]);
    }
    Fiber* f = ready[head];
    head = (head + 1) % ready.size();
    --count;
    return f;
  }
};
inline thread_local Block* tl_block = nullptr;
inline thread_local Fiber* tl_fiber = nullptr;
// noinline: a fiber never migrates between OS threads, but keep TLS lookups out of kernels' hot loops
inline Fiber& self() { return *tl_fiber; }
inline Block& blk() { return *tl_block; }
inline void jump(Fiber* from, Fiber* to) {  // nullptr = scheduler
  Block& b = blk();
  tl_fiber = to;
#if defined(__x86_64__)
  switch_stack(from ? &from->sp : &b.main_sp, to ? to->sp : b.main_sp);
#else
  swapcontext(from ? &from->ctx : &b.main_ctx, to ? &to->ctx : &b.main_ctx);
#endif
}
inline void park(const char* why) {  // caller is already on some wait list
  Block& b = blk();
  Fiber* me = tl_fiber;
  me->waiting = why;
  jump(me, b.count ? b.pop() : nullptr);
  me->waiting = nullptr;
  if (b.error) throw std::runtime_error("cuda_emulator: block aborted");
}
inline void release_barrier() {
  Block& b = blk();
  b.phase ^= 1;
  for (int i = 0; i < 3; ++i) b.pred_res[b.phase][i] = b.pred_acc[i];
  b.pred_acc[0] = 0;
  b.pred_acc[1] = 1;
  b.pred_acc[2] = 0;
  b.arrived = 0;
  for (Fiber* f : b.at_barrier) b.push(f);
  b.at_barrier.clear();
}
inline unsigned block_barrier(int pred) {
  Block& b = blk();
  b.pred_acc[0] |= pred != 0;
  b.pred_acc[1] &= pred != 0;
  b.pred_acc[2] += pred != 0;
  const unsigned next = b.phase ^ 1;
  if (++b.arrived == b.live) {
    release_barrier();
    return next;
  }
  b.at_barrier.push_back(tl_fiber);
  park("__syncthreads");
  return next;
}
// Every lane of `mask` contributes `v`; returns the buffer with all contributions.
inline const uint64_t* warp_exchange(unsigned mask, uint64_t v) {
  Fiber& f = self();
  Block& b = blk();
  if (!(mask >> f.lane & 1)) throw std::runtime_error("cuda_emulator: calling lane is not in the warp mask");
  auto& groups = b.warps[f.warp];
  WarpGroup* g = nullptr;
  for (auto& x : groups)
    if (x.mask == mask) {
      g = &x;
      break;
    }
  if (!g) {
    if (groups.capacity() == groups.size()) throw std::runtime_error("cuda_emulator: too many warp masks");
    groups.emplace_back();
    g = &groups.back();
    g->mask = mask;
  }
  const unsigned ph = g->phase;
  g->slot[ph][f.lane] = v;
  g->arrived |= 1u << f.lane;
  const unsigned last = b.nthreads - f.warp * 32;  // ragged last warp: lanes that do not exist
  const unsigned need = last >= 32 ? mask : mask & ((1u << last) - 1);
  if (g->arrived == need) {
    g->arrived = 0;
    g->phase ^= 1;
    for (unsigned l = 0; l < 32; ++l)
      if ((need >> l & 1) && l != f.lane) b.push(&b.fibers[f.warp * 32 + l]);
  } else
    park("warp collective");
  return g->slot[ph];
}
template <class T>
inline uint64_t bits(T v) {
  static_assert(sizeof(T) <= 8);
  uint64_t u = 0;
  std::memcpy(&u, &v, sizeof(T));
  return u;
}
template <class T>
inline T unbits(uint64_t u) {
  T v;
  std::memcpy(&v, &u, sizeof(T));
  return v;
}
template <class T>
inline T shfl(unsigned mask, T v, int src, bool ok) {
  const uint64_t* s = warp_exchange(mask, bits(v));
  return ok ? unbits<T>(s[src & 31]) : v;
}
inline void fiber_main() {
  Block& b = blk();
  try {
    (*b.body)();
  } catch (...) {
    if (!b.error) b.error = std::current_exception();
  }
  Fiber* me = tl_fiber;
  me->done = true;
  --b.live;
  if (b.live && b.arrived == b.live && !b.at_barrier.empty()) release_barrier();  // exited threads leave barriers
  jump(me, b.count ? b.pop() : nullptr);
  std::abort();
}
inline void run_block(Block& b, const std::function<void()>& body) {
  tl_block = &b;
  b.body = &body;
  b.error = nullptr;
  b.nthreads = b.live = b.block.x * b.block.y * b.block.z;
  b.arrived = 0;
  b.phase = 0;
  b.head = b.count = 0;
  b.pred_acc[0] = 0;
  b.pred_acc[1] = 1;
  b.pred_acc[2] = 0;
  b.at_barrier.clear();
  if (b.fibers.size() != b.nthreads) {
    b.fibers = std::vector<Fiber>(b.nthreads);
    b.ready.assign(b.nthreads + 1, nullptr);
  }
  if (b.nstacks < b.nthreads) {
    b.stacks.reset(new char[(size_t)b.nthreads * b.stack_bytes]);
    b.nstacks = b.nthreads;
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(b.stacks.get(), b.nstacks * b.stack_bytes);  // frames of fibers that never unwound
#endif
  b.warps.resize((b.nthreads + 31) / 32);
  for (auto& w : b.warps) {
    w.clear();
    w.reserve(64);
  }
  for (unsigned i = 0; i < b.nthreads; ++i) {
    Fiber& f = b.fibers[i];
    f.done = false;
    f.waiting = nullptr;
    f.linear = i;
    f.lane = i & 31;
    f.warp = i >> 5;
    f.tid = {i % b.block.x, i / b.block.x % b.block.y, i / (b.block.x * b.block.y)};
    char* base = b.stacks.get() + (size_t)i * b.stack_bytes;
#if defined(__x86_64__)
    // stagger stack tops by a cache line so that fibers do not all hit one L1 set
    uintptr_t top = ((uintptr_t)(base + b.stack_bytes) & ~(uintptr_t)63) - 64 * (i % 32);
    void** sp = (void**)top;
    *--sp = nullptr;
    *--sp = (void*)&fiber_main;
    sp -= 6;
    std::memset(sp, 0, 48);
    f.sp = sp;
#else
    getcontext(&f.ctx);
    f.ctx.uc_stack.ss_sp = base;
    f.ctx.uc_stack.ss_size = b.stack_bytes;
    f.ctx.uc_link = nullptr;
    makecontext(&f.ctx, fiber_main, 0);
#endif
    b.push(&f);
  }
  jump(nullptr, b.pop());
  if (b.live && !b.error) {
    unsigned sync = 0, warp = 0;
    for (auto& f : b.fibers)
      if (!f.done && f.waiting) (f.waiting[2] == 's' ? sync : warp)++;
    throw std::runtime_error("cuda_emulator: deadlock in block: " + std::to_string(sync) +
                             " threads in __syncthreads, " + std::to_string(warp) + " in a warp collective, " +
                             std::to_string(b.nthreads - b.live) + " exited");
  }
  if (b.error) std::rethrow_exception(b.error);  // parked fibers are dropped without unwinding
}
struct Options {
  unsigned os_threads = 0;
  size_t stack_bytes = 32 * 1024;
};
inline Options& options() {
  static Options o;
  return o;
}
// OPD_EMULATOR_SEED, read at every launch: anything but 0 shuffles the order in which a block's threads run.
inline uint64_t shuffle_seed() {
  const char* text = std::getenv("OPD_EMULATOR_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}
template <class F>
void launch(dim3 grid, dim3 block, size_t dyn_bytes, F&& f) {
  const size_t nb = (size_t)grid.x * grid.y * grid.z;
  const unsigned nt = (unsigned)std::min<size_t>(
      nb, options().os_threads ? options().os_threads : std::max(1u, std::thread::hardware_concurrency()));
  std::atomic<size_t> next{0};
  std::exception_ptr err;
  std::mutex mu;
  std::function<void()> body = std::forward<F>(f);
  const uint64_t seed = shuffle_seed();
  auto work = [&] {
    Block b;
    b.grid = grid;
    b.block = block;
    b.stack_bytes = options().stack_bytes;
    b.dyn.assign(dyn_bytes / 8 + 3, ~0ull);  // NaN-poisoned dynamic shared memory
    try {
      for (size_t i; (i = next++) < nb;) {
        b.bid = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / ((size_t)grid.x * grid.y))};
        b.rng = seed ? seed * 0x9E3779B97F4A7C15ull + i + 1 : 0;
        run_block(b, body);
      }
    } catch (...) {
      std::lock_guard<std::mutex> l(mu);
      if (!err) err = std::current_exception();
      next = nb;
    }
  };
  std::vector<std::thread> ts;
  for (unsigned i = 0; i < nt; ++i) ts.emplace_back(work);  // fresh threads: thread_local smem starts clean
  for (auto& t : ts) t.join();
  if (err) std::rethrow_exception(err);
}
}  // namespace cuda_emulator
#define threadIdx (::cuda_emulator::self().tid)
#define blockIdx (::cuda_emulator::blk().bid)
#define blockDim (::cuda_emulator::blk().block)
#define gridDim (::cuda_emulator::blk().grid)
constexpr int warpSize = 32;
inline void __syncthreads() { cuda_emulator::block_barrier(0); }
inline int __syncthreads_or(int p) {
  unsigned r = cuda_emulator::block_barrier(p);
  return cuda_emulator::blk().pred_res[r][0];
}
inline int __syncthreads_and(int p) {
  unsigned r = cuda_emulator::block_barrier(p);
  return cuda_emulator::blk().pred_res[r][1];
}
inline int __syncthreads_count(int p) {
  unsigned r = cuda_emulator::block_barrier(p);
  return cuda_emulator::blk().pred_res[r][2];
}
inline void __syncwarp(unsigned m = 0xffffffffu) { cuda_emulator::warp_exchange(m, 0); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() {}
inline unsigned __emulator_lane() { return cuda_emulator::self().lane; }
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  int l = __emulator_lane(), s = l ^ x;
  return cuda_emulator::shfl(m, v, s, (s / w) <= (l / w));
}
template <class T>
T __shfl_sync(unsigned m, T v, int s, int w = 32) {
  int l = __emulator_lane();
  return cuda_emulator::shfl(m, v, (l & ~(w - 1)) | (s & (w - 1)), true);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = __emulator_lane(), s = l - (int)d;
  return cuda_emulator::shfl(m, v, s, s >= (l & ~(w - 1)));
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = __emulator_lane(), s = l + (int)d;
  return cuda_emulator::shfl(m, v, s, s < (l & ~(w - 1)) + w);
}
inline unsigned __ballot_sync(unsigned m, int p) {
  const uint64_t* s = cuda_emulator::warp_exchange(m, p != 0);
  unsigned r = 0;
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) r |= (unsigned)(s[i] & 1) << i;
  return r;
}
inline unsigned __reduce_add_sync(unsigned m, unsigned v) {
  const uint64_t* s = cuda_emulator::warp_exchange(m, v);
  unsigned r = 0;
  for (int i = 0; i < 32; ++i)
    if (m >> i & 1) r += (unsigned)s[i];
  return r;
}
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }
template <class T>
unsigned __match_any_sync(unsigned m, T v) {
  auto b = cuda_emulator::bits(v);
  const uint64_t* s = cuda_emulator::warp_exchange(m, b);
  unsigned r = 0;
  for (int i = 0; i < 32; ++i)
    if ((m >> i & 1) && s[i] == b) r |= 1u << i;
  return r;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline unsigned __float_as_uint(float f) { return cuda_emulator::unbits<unsigned>(cuda_emulator::bits(f)); }
inline float __uint_as_float(unsigned u) { return cuda_emulator::unbits<float>(u); }
template <class T, class U>
T __emulator_rmw(T* p, U f) {
  T o;
  __atomic_load(p, &o, __ATOMIC_SEQ_CST);
  for (;;) {
    T n = f(o);
    if (__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return o;
  }
}
template <class T>
T atomicAdd(T* p, T v) {
  return __emulator_rmw(p, [&](T o) { return (T)(o + v); });
}
template <class T>
T atomicMax(T* p, T v) {
  return __emulator_rmw(p, [&](T o) { return o > v ? o : v; });
}
template <class T>
T atomicMin(T* p, T v) {
  return __emulator_rmw(p, [&](T o) { return o < v ? o : v; });
}
template <class T>
T atomicOr(T* p, T v) {
  return __emulator_rmw(p, [&](T o) { return (T)(o | v); });
}
template <class T>
T atomicExch(T* p, T v) {
  return __emulator_rmw(p, [&](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T c, T v) {
  __atomic_compare_exchange(p, &c, &v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return c;
}
