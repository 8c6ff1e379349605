// The native CPU backend. native.py compiles this file, defines MOST_STATES, MOST_TAPS, NATIVE_CHUNK and GROUP_CHANNELS, and
// calls the functions at its end with pointers: without PyTorch's headers it compiles in a third of the time, and once for all
// versions of PyTorch. The .inl files are included below: kernels.inl has the arithmetic, memory.inl memory and threads,
// scan.inl and conv.inl the jobs. This file has the interface to the kernels, the instruction sets and the functions.
//
// The work is divided by shape only, never by the number of threads, and partial sums are added in a fixed order. So
// results are bit-equal at any number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string_view>
#include <utility>

#ifdef __GLIBC__
#include <malloc.h>
#endif

// Steps between the states that the forward pass keeps (N / CHUNK of u's size in total). The backward pass recomputes one
// chunk at a time, four states at once. backend.py sets the number and gives the reason.
constexpr int64_t CHUNK = NATIVE_CHUNK;

// Rows of some channels: row t begins at `at + t * stride`. The stride is negative for a reversed scan.
struct Rows {
  float* at = nullptr;
  int64_t stride = 0;
  float* operator[](int64_t t) const { return at + t * stride; }
};

struct Offset {  // to the rows to prefetch, relative to the current ones
  int64_t steps, channels;
};

struct Span {  // of steps, or of blocks
  int64_t begin, end;
};

struct Scan {  // one direction of one batch row and one block of channels
  int64_t states;
  Rows u, delta, B, C, z;  // z.at is null if another direction applies the gate, or if there is no gate
  const float* weights;    // vectors over the block's channels: A / ln 2 for each state, D, delta's bias
  float* starts;           // states at the beginning of the second chunk; null if no gradient is needed
  int64_t start_stride;    // distance to the next chunk's states
  Offset next;             // what to prefetch
};

struct Gradients {  // of the same block: y is read; u, delta and z are written; the weights' sums are updated
  Rows y, u, delta, z;  // z.at is null if another direction writes z's, or if there is no gate
  Rows out;             // output of the forward pass; read for z's gradient
  float* weights;
};

struct Scratch {  // memory of one thread
  float *decays, *states;  // for four states
  float *delta, *delta_u, *slope, *dy, *d_delta_u, *d_delta;  // for each step of a chunk
  float *dB, *dC;  // per four states and step of a chunk: folded over lanes, summed over a group's blocks
  bool accumulate;  // true if an earlier block of the group has written dB and dC: add to them
  float* carry;     // per block of a group: gradient that the later chunks pass to its states
};

struct Conv {
  int64_t length, taps;
  Rows x;
  const float* weights;  // vectors over the block's channels: one per tap, then the bias
  Offset next;           // what to prefetch
};

struct Kernels {
  const char* name;
  int lanes;
  void (*forward)(const Scan&, Rows y, float* h, Span steps, bool add);
  void (*backward)(const Scan&, const Gradients&, const Scratch&, Span steps);
  void (*sum_lanes)(const float* from, int64_t stride, float* to, int64_t states);
  void (*convolve)(const Conv&, Rows y, Span steps);
  void (*convolve_backward)(const Conv&, Rows dy, Rows dx, float* dweights, Span steps, bool add);
};

namespace plain {
#define NAME "plain"
#define LANES 4
#include "kernels.inl"
#undef LANES
#undef NAME
}  // namespace plain

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DISPATCH 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define NAME "avx2"
#define LANES 8
#include "kernels.inl"
#undef LANES
#undef NAME
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define NAME "avx512"
#define LANES 16
#include "kernels.inl"
#undef LANES
#undef NAME
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

const Kernels* chosen = &plain::kernels;

const Kernels& kernels() { return *chosen; }

// Return the kernels of an instruction set, or of the best one if the name is empty; null if this processor lacks it.
const Kernels* find_kernels(const char* name) {
  const Kernels* found = nullptr;
  const auto offer = [&](const Kernels& kernels, bool here) {
    if (here && (!*name || std::string_view(name) == kernels.name)) found = &kernels;
  };
  offer(plain::kernels, true);
#ifdef DISPATCH
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  offer(avx2::kernels, has_avx2);
  offer(avx512::kernels, has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"));
#endif
  return found;
}

#include "memory.inl"

#include "scan.inl"

#include "conv.inl"

}  // namespace

extern "C" {

// Select the named instruction set, or the best one of this processor if the name is empty; return its name, or null if this
// processor lacks it. A forward pass keeps arrays in the layout of one instruction set, so its backward pass must use the same.
const char* use_instruction_set(const char* name) {
  const Kernels* found = find_kernels(name);
  if (!found) return nullptr;
  chosen = found;
  return chosen->name;
}

const char* best_instruction_set() { return find_kernels("")->name; }

int64_t lanes() { return kernels().lanes; }

// Make the C library keep up to 256 MiB of freed memory, in all of the process, unless the environment sets its thresholds (as
// jobs do: pipelines/worker.py). A training step frees what the next one allocates again. By default large pieces go back to
// the system, and to fault them in again takes as long as a scan.
void keep_freed_memory() {
#ifdef __GLIBC__
  if (std::getenv("MALLOC_TRIM_THRESHOLD_")) return;
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

void scan_forward(const ScanJob* job) { forward(*job); }

void scan_backward(const ScanJob* job) { Backward(*job).run(); }

void conv_forward(const ConvJob* job) { forward(*job); }

void conv_backward(const ConvJob* job) { backward(*job); }

}  // extern "C"
