// The native CPU backend as PyTorch operators, with their gradients: memory, threads, views, the choice of instruction
// set. The arithmetic stands in kernels.cpp. native.py builds and loads this file.
//
// native.py sets MOST_STATES and MOST_TAPS.
//
// The work is cut by shape alone, never by the number of threads, and partial sums are added in a fixed order: results
// are the same bits at any number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// Steps between the states that the forward pass keeps, N / CHUNK of u's size in all, and that the backward pass replays
// at once: 128 KiB of states and decays at 16 states and 16 lanes, which stay in a core's second cache.
constexpr int64_t CHUNK = 64;

// A matrix of rows for some channels: row t begins at `at + t * stride`; the stride is negative for a backward scan.
struct Rows {
  float* at = nullptr;
  int64_t stride = 0;
  float* operator[](int64_t t) const { return at + t * stride; }
};

struct Scan {  // one direction of one batch row and one block of channels
  int64_t length, states;
  Rows u, delta, B, C, z;  // z.at is null where another direction applies the gate, or nobody
  const float* weights;    // vectors over the block's channels: A / ln 2 for each state, D, delta's bias
  float* starts;           // states at the beginning of each chunk but the first; null where no gradient is wanted
};

struct Gradients {  // of the same block; y is read, u and delta written, the rest added to
  Rows y, u, delta, z;
  float* weights;
};

struct Scratch {  // a thread's own memory
  float *decays, *states, *delta, *slope, *dy, *dz, *carry;
  float *dB, *dC;  // a vector for each step and four states, folded over lanes, summed over a group's blocks
};

struct Conv {
  int64_t length, taps;
  Rows x;
  const float* weights;  // vectors over the block's channels: one for each tap, then the bias
};

struct Kernels {
  const char* name;
  int lanes;
  void (*forward)(const Scan&, Rows y, bool add);
  void (*backward)(const Scan&, const Gradients&, const Scratch&, bool add_z);
  void (*sum_lanes)(const float* from, float* to, int64_t count);
  void (*convolve)(const Conv&, Rows y);
  void (*convolve_backward)(const Conv&, Rows dy, Rows dx, float* dweights, bool add);
};

namespace plain {
#define NAME "plain"
#define LANES 4
#include "kernels.cpp"
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
#include "kernels.cpp"
#undef LANES
#undef NAME
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define NAME "avx512"
#define LANES 16
#include "kernels.cpp"
#undef LANES
#undef NAME
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const Kernels* chosen = nullptr;

const Kernels& kernels() { return *chosen; }

// Takes the named instruction set, or the best that the processor has where the name is empty; gives its name. What a
// forward pass keeps is laid out for one instruction set: its backward pass must run under the same.
std::string use_instruction_set(const std::string& name) {
  std::vector<const Kernels*> known{&plain::kernels}, here{&plain::kernels};
#ifdef DISPATCH
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  known.insert(known.end(), {&avx2::kernels, &avx512::kernels});
  if (has_avx2) here.push_back(&avx2::kernels);
  if (has_avx512) here.push_back(&avx512::kernels);
#endif
  const auto find = [&](const std::vector<const Kernels*>& among) {
    return std::find_if(among.begin(), among.end(), [&](const Kernels* k) { return name == k->name; });
  };
  TORCH_CHECK_VALUE(name.empty() || find(known) != known.end(), "no instruction set '", name,
                    "': there are plain, avx2 and avx512");
  TORCH_CHECK_VALUE(name.empty() || find(here) != here.end(), "this processor has no ", name, ", only ",
                    here.back()->name);
  chosen = name.empty() ? here.back() : *find(here);
  return chosen->name;
}

// ---- memory

// A thread's floats, kept from call to call: fresh pages would cost more than a small scan.
float* scratch(int64_t floats) {
  struct Free { void operator()(float* p) const { std::free(p); } };
  static thread_local std::unique_ptr<float, Free> held;
  static thread_local int64_t size = 0;
  if (floats > size) {
    held.reset();
    held.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
    TORCH_CHECK(held, "selective scan: no memory for ", floats, " floats of scratch");
    size = floats;
  }
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())
    std::fill_n(held.get(), floats, std::numeric_limits<float>::quiet_NaN());
  return held.get();
}

// Hands out pieces of one allocation, each at a multiple of 64 bytes; with no memory behind it, it counts.
struct Carver {
  float* at = nullptr;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = at ? at + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return piece;
  }
};

Tensor cast(const Tensor& x, at::ScalarType type) { return x.scalar_type() == type ? x : x.to(type); }

// float32 with neighbouring channels: itself where it is so already, a copy where not.
Tensor rowwise(const Tensor& x) {
  const Tensor floats = cast(x, at::kFloat);
  return floats.size(-1) == 1 || floats.stride(-1) == 1 ? floats : floats.contiguous();
}

struct View {  // a (batch, length, channels) tensor as float rows
  float* data = nullptr;
  int64_t batch = 0, row = 0, length = 0;
  View() = default;
  explicit View(const Tensor& x)
      : data(x.data_ptr<float>()), batch(x.stride(0)), row(x.stride(1)), length(x.size(1)) {}
  Rows rows(int64_t b, int64_t channel, bool reverse) const {
    if (!data) return {};
    float* first = data + b * batch + channel;
    return reverse ? Rows{first + (length - 1) * row, -row} : Rows{first, row};
  }
};

// ---- odd widths: the last block of channels is worked on in padded copies

Rows padded(Carver& memory, Rows from, int64_t length, int64_t channels, int lanes) {
  if (!from.at) return {};
  Rows to{memory.take(length * lanes), lanes};
  for (int64_t t = 0; memory.at && t < length; t++) {
    std::memcpy(to[t], from[t], channels * sizeof(float));
    std::memset(to[t] + channels, 0, (lanes - channels) * sizeof(float));
  }
  return to;
}

void unpad(Rows from, Rows to, int64_t length, int64_t channels) {
  for (int64_t t = 0; to.at && t < length; t++) std::memcpy(to[t], from[t], channels * sizeof(float));
}

// ---- parameters: vectors over a block's channels, padded by zeros

struct Blocks {
  int64_t channels, lanes, count;
  explicit Blocks(int64_t channels)
      : channels(channels), lanes(kernels().lanes), count((channels + lanes - 1) / lanes) {}
  int64_t width(int64_t block) const { return std::min(lanes, channels - block * lanes); }
};

// (blocks, columns, lanes) of the columns of matrix_EK times `scale`, beginning at column `first`.
void pack(const Tensor& matrix_EK, float scale, const Blocks& blocks, int64_t columns, int64_t first, float* to) {
  const Tensor floats = cast(matrix_EK, at::kFloat).contiguous();
  const float* from = floats.data_ptr<float>();
  const int64_t count = floats.numel() / blocks.channels;
  for (int64_t e = 0; e < blocks.channels; e++)
    for (int64_t k = 0; k < count; k++)
      to[(e / blocks.lanes * columns + first + k) * blocks.lanes + e % blocks.lanes] = from[e * count + k] * scale;
}

// The gradient of such a matrix: summed over the partial sums of `groups` groups of batch rows, in order.
Tensor unpack(const Tensor& sums, const Tensor& like, const Blocks& blocks, int64_t groups, int64_t columns,
              int64_t first) {
  Tensor out = at::empty(like.sizes(), like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  const int64_t count = out.numel() / blocks.channels, group = blocks.count * columns * blocks.lanes;
  const float* from = sums.data_ptr<float>();
  float* to = out.data_ptr<float>();
  for (int64_t e = 0; e < blocks.channels; e++)
    for (int64_t k = 0; k < count; k++) {
      const float* at = from + (e / blocks.lanes * columns + first + k) * blocks.lanes + e % blocks.lanes;
      float sum = 0.0f;
      for (int64_t g = 0; g < groups; g++) sum += at[g * group];
      to[e * count + k] = sum;
    }
  return cast(out, like.scalar_type());
}

// ---- the scan

constexpr int64_t GROUP_CHANNELS = 192;  // share one partial sum of dB and dC: these cost 1/6 of u at 16 states
constexpr int64_t GROUP_STEPS = 128;     // at least so many share one partial sum of dA: these cost at most 1/7 of u

struct Direction {
  Tensor u, delta, B, C, weights, starts;
  bool reverse;
  View u_view, delta_view, B_view, C_view;

  // `kept` are the weights and starts of a forward pass, or nothing.
  Direction(at::TensorList inputs, bool reverse, const Blocks& blocks, at::TensorList kept)
      : u(rowwise(inputs[0])), delta(rowwise(inputs[1])), B(rowwise(inputs[3])), C(rowwise(inputs[4])),
        reverse(reverse), u_view(u), delta_view(delta), B_view(B), C_view(C) {
    if (!kept.empty()) {
      weights = kept[0], starts = kept[1];
      return;
    }
    const int64_t states = B.size(2);
    weights = at::zeros({blocks.count, states + 2, blocks.lanes}, u.options());
    pack(inputs[2], 1.4426950408889634f, blocks, states + 2, 0, weights.data_ptr<float>());
    pack(inputs[5], 1.0f, blocks, states + 2, states, weights.data_ptr<float>());
    pack(inputs[6], 1.0f, blocks, states + 2, states + 1, weights.data_ptr<float>());
  }

  Scan block(int64_t b, int64_t block, const Blocks& blocks, const View& z) const {
    const int64_t channel = block * blocks.lanes;
    return {u.size(1),
            B.size(2),
            u_view.rows(b, channel, reverse),
            delta_view.rows(b, channel, reverse),
            B_view.rows(b, 0, reverse),
            C_view.rows(b, 0, reverse),
            z.rows(b, channel, reverse),
            weights.data_ptr<float>() + block * (B.size(2) + 2) * blocks.lanes,
            starts.defined() ? starts.data_ptr<float>() + (b * blocks.count + block) * starts.stride(1) : nullptr};
  }
};

// The inputs of the operator: seven tensors a direction, then the gate z where there is one.
struct Job {
  Blocks blocks;
  std::vector<Direction> directions;
  Tensor z;
  View z_view;

  Job(at::TensorList inputs, bool reverse, at::TensorList kept = {}) : blocks(inputs[0].size(2)) {
    for (size_t i = 0; i < inputs.size() / 7; i++)
      directions.emplace_back(inputs.slice(7 * i, 7), i ? !reverse : reverse, blocks,
                              kept.empty() ? kept : kept.slice(2 * i, 2));
    if (inputs.size() % 7) z = rowwise(inputs.back()), z_view = View(z);
  }
  int64_t batch() const { return directions[0].u.size(0); }
  int64_t length() const { return directions[0].u.size(1); }
  int64_t states() const { return directions[0].B.size(2); }
  Tensor new_starts() const {
    return at::empty({batch(), blocks.count, (length() - 1) / CHUNK, states(), blocks.lanes}, directions[0].weights.options());
  }
};

void pad(Carver& memory, Scan& s, int64_t channels, int lanes) {
  s.u = padded(memory, s.u, s.length, channels, lanes);
  s.delta = padded(memory, s.delta, s.length, channels, lanes);
  s.z = padded(memory, s.z, s.length, channels, lanes);
}

void forward_block(const Job& job, const View& y, int64_t b, int64_t block) {
  const int lanes = kernels().lanes;
  const int64_t channels = job.blocks.width(block), last = job.directions.size() - 1;
  for (int64_t i = 0; i <= last; i++) {
    const Direction& direction = job.directions[i];
    Scan scan = direction.block(b, block, job.blocks, i == last ? job.z_view : View());
    const Rows out = y.rows(b, block * lanes, direction.reverse);
    if (channels == lanes) {
      kernels().forward(scan, out, i > 0);
      continue;
    }
    Carver memory{scratch(4 * (scan.length * lanes + 16))};
    pad(memory, scan, channels, lanes);
    const Rows copy = padded(memory, out, scan.length, channels, lanes);
    kernels().forward(scan, copy, i > 0);
    unpad(copy, out, scan.length, channels);
  }
}

Tensor scan_forward(const Job& job) {
  const Tensor& u = job.directions[0].u;
  Tensor y = at::empty(u.sizes(), u.options().memory_format(at::MemoryFormat::Contiguous));
  const View view(y);
  at::parallel_for(0, job.batch() * job.blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) forward_block(job, view, i / job.blocks.count, i % job.blocks.count);
  });
  return y;
}

// One direction's gradients: du and ddelta whole, dB and dC in parts by group of channels, dweights by group of batch rows.
struct Sums {
  Tensor du, ddelta, dB, dC, dweights;
  View du_view, ddelta_view;

  Sums(const Direction& d, int64_t groups, int64_t batch_groups)
      : du(at::empty(d.u.sizes(), d.u.options().memory_format(at::MemoryFormat::Contiguous))),
        ddelta(at::empty_like(du)),
        dB(at::empty({groups, d.B.size(0), d.B.size(1), d.B.size(2)}, d.B.options())),
        dC(at::empty_like(dB)),
        dweights(at::zeros({batch_groups, d.weights.size(0), d.weights.size(1), d.weights.size(2)}, d.u.options())),
        du_view(du), ddelta_view(ddelta) {}
};

Tensor sum_groups(const Tensor& parts) {
  if (parts.size(0) == 1) return parts[0];
  Tensor sum = parts[0] + parts[1];
  for (int64_t g = 2; g < parts.size(0); g++) sum += parts[g];
  return sum;
}

class Backward {
 public:
  Backward(const Job& job, const Tensor& dy)
      : job(job), dy(rowwise(dy)), dy_view(this->dy), lanes(job.blocks.lanes), length(job.length()),
        states(job.states()), groups((job.blocks.channels + GROUP_CHANNELS - 1) / GROUP_CHANNELS),
        batch_groups(std::clamp<int64_t>(job.batch() * length / GROUP_STEPS, 1, job.batch())) {
    for (const Direction& direction : job.directions) sums.emplace_back(direction, groups, batch_groups);
    if (job.z.defined()) {
      dz = at::empty(job.z.sizes(), job.z.options().memory_format(at::MemoryFormat::Contiguous));
      dz_view = View(dz);
    }
  }

  void run() {
    at::parallel_for(0, groups * batch_groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; item++)
        for (size_t i = 0; i < sums.size(); i++) one(item / groups, item % groups, i);
    });
  }

  // In the order of the operator's inputs, in their types.
  variable_list gradients(at::TensorList inputs) const {
    variable_list out;
    const int64_t columns = states + 2;
    for (size_t i = 0; i < sums.size(); i++) {
      const Sums& s = sums[i];
      const auto in = inputs.slice(7 * i, 7);
      const auto weight = [&](int k, int64_t first) {
        return unpack(s.dweights, in[k], job.blocks, batch_groups, columns, first);
      };
      for (const Tensor& gradient : {s.du, s.ddelta, weight(2, 0), sum_groups(s.dB), sum_groups(s.dC),
                                     weight(5, states), weight(6, states + 1)})
        out.push_back(cast(gradient, in[out.size() % 7].scalar_type()));
    }
    if (dz.defined()) out.push_back(cast(dz, inputs.back().scalar_type()));
    return out;
  }

 private:
  const Job& job;
  Tensor dy, dz;
  View dy_view, dz_view;
  int64_t lanes, length, states, groups, batch_groups;
  std::vector<Sums> sums;

  int64_t folded() const { return (states + 3) / 4 * lanes; }

  Scratch carve(Carver& memory) const {
    const int64_t state = states * lanes;
    return {memory.take(CHUNK * state),
            memory.take((CHUNK + 1) * state),
            memory.take(CHUNK * lanes),
            memory.take(CHUNK * lanes),
            memory.take(CHUNK * lanes),
            memory.take(CHUNK * lanes),
            memory.take(state),
            memory.take(length * folded()),
            memory.take(length * folded())};
  }

  // One direction of one group of batch rows and one group of channels.
  void one(int64_t batch_group, int64_t group, int64_t i) {
    const int64_t first = batch_group * job.batch() / batch_groups, end = (batch_group + 1) * job.batch() / batch_groups;
    const int64_t group_blocks = GROUP_CHANNELS / lanes, last = std::min((group + 1) * group_blocks, job.blocks.count);
    Carver count;
    carve(count);
    const int64_t padding = 7 * (length * lanes + 16);
    Carver memory{scratch(count.used + padding)};
    const Scratch work = carve(memory);
    for (int64_t b = first; b < end; b++) {
      std::memset(work.dB, 0, length * folded() * sizeof(float));
      std::memset(work.dC, 0, length * folded() * sizeof(float));
      for (int64_t block = group * group_blocks; block < last; block++) one_block(i, b, batch_group, block, work, memory);
      const int64_t matrix = (group * job.batch() + b) * length * states;
      collect(work.dB, sums[i].dB.data_ptr<float>() + matrix, job.directions[i].reverse);
      collect(work.dC, sums[i].dC.data_ptr<float>() + matrix, job.directions[i].reverse);
    }
  }

  void one_block(int64_t i, int64_t b, int64_t batch_group, int64_t block, const Scratch& work, Carver memory) {
    const Direction& direction = job.directions[i];
    Scan scan = direction.block(b, block, job.blocks, job.z_view);
    const int64_t channel = block * lanes, channels = job.blocks.width(block), columns = states + 2;
    const auto rows = [&](const View& view) { return view.rows(b, channel, direction.reverse); };
    const Gradients out{rows(dy_view), rows(sums[i].du_view), rows(sums[i].ddelta_view), rows(dz_view),
                        sums[i].dweights.data_ptr<float>() +
                            (batch_group * job.blocks.count + block) * columns * lanes};
    if (channels == lanes) return kernels().backward(scan, out, work, i > 0);
    pad(memory, scan, channels, lanes);
    const auto copy = [&](Rows from) { return padded(memory, from, length, channels, lanes); };
    const Gradients copies{copy(out.y), copy(out.u), copy(out.delta), copy(out.z), out.weights};
    kernels().backward(scan, copies, work, i > 0);
    unpad(copies.u, out.u, length, channels);
    unpad(copies.delta, out.delta, length, channels);
    unpad(copies.z, out.z, length, channels);
  }

  void collect(const float* vectors, float* to, bool reverse) const {
    for (int64_t t = 0; t < length; t++)
      kernels().sum_lanes(vectors + t * folded(), to + (reverse ? length - 1 - t : t) * states, states);
  }
};

// Nothing here has a gradient of its own: differentiating twice must fail, not give zeros.
void refuse_second_order() {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "the native scan is differentiable once: for second "
                              "derivatives (create_graph=True) set the backend to chunked");
}

bool wants_gradient(at::TensorList inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const Tensor& x) { return x.requires_grad(); });
}

struct ScanFunction : torch::autograd::Function<ScanFunction> {
  static Tensor forward(AutogradContext* context, at::TensorList inputs, bool reverse) {
    Job job(inputs, reverse);
    variable_list saved = inputs.vec();
    for (Direction& direction : job.directions) {
      direction.starts = job.new_starts();
      saved.insert(saved.end(), {direction.weights, direction.starts});
    }
    context->save_for_backward(std::move(saved));
    context->saved_data["reverse"] = reverse;
    return cast(scan_forward(job), inputs[0].scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list dy) {
    refuse_second_order();
    const at::AutoDispatchBelowADInplaceOrView below;
    const variable_list saved = context->get_saved_variables();
    const size_t kept = saved.size() / 9 * 2;  // a direction is seven inputs, weights and starts; then perhaps the gate
    const at::TensorList all(saved), inputs = all.slice(0, all.size() - kept);
    const Job job(inputs, context->saved_data["reverse"].toBool(), all.slice(all.size() - kept));
    Backward backward(job, dy[0]);
    backward.run();
    variable_list gradients = backward.gradients(inputs);
    gradients.emplace_back();  // reverse has none
    return gradients;
  }
};

Tensor scan(at::TensorList inputs, bool reverse) {
  if (wants_gradient(inputs)) return ScanFunction::apply(inputs, reverse);
  return cast(scan_forward(Job(inputs, reverse)), inputs[0].scalar_type());
}

// ---- the convolution

// x once, and for each direction a weight and a bias.
struct ConvJob {
  Blocks blocks;
  Tensor x;
  View x_view;
  int64_t taps;
  bool reverse;
  std::vector<Tensor> weights;

  ConvJob(at::TensorList inputs, bool reverse)
      : blocks(inputs[0].size(2)), x(rowwise(inputs[0])), x_view(x), taps(inputs[1].size(1)), reverse(reverse) {
    for (size_t i = 1; i < inputs.size(); i += 2) {
      weights.push_back(at::zeros({blocks.count, taps + 1, blocks.lanes}, x.options()));
      pack(inputs[i], 1.0f, blocks, taps + 1, 0, weights.back().data_ptr<float>());
      pack(inputs[i + 1], 1.0f, blocks, taps + 1, taps, weights.back().data_ptr<float>());
    }
  }
  bool reversed(size_t i) const { return i ? !reverse : reverse; }
  Conv block(size_t i, int64_t b, int64_t block) const {
    return {x.size(1), taps, x_view.rows(b, block * blocks.lanes, reversed(i)),
            weights[i].data_ptr<float>() + block * (taps + 1) * blocks.lanes};
  }
};

void conv_forward_block(const ConvJob& job, const Conv& conv, Rows y, int64_t channels) {
  const int lanes = job.blocks.lanes;
  if (channels == lanes) return kernels().convolve(conv, y);
  Carver memory{scratch(2 * (conv.length * lanes + 16))};
  const Conv copy{conv.length, conv.taps, padded(memory, conv.x, conv.length, channels, lanes), conv.weights};
  const Rows out = padded(memory, y, conv.length, channels, lanes);
  kernels().convolve(copy, out);
  unpad(out, y, conv.length, channels);
}

variable_list conv_forward(const ConvJob& job, at::ScalarType type) {
  variable_list outputs;
  std::vector<View> views;
  for (size_t i = 0; i < job.weights.size(); i++) {
    outputs.push_back(at::empty(job.x.sizes(), job.x.options().memory_format(at::MemoryFormat::Contiguous)));
    views.emplace_back(outputs[i]);
  }
  at::parallel_for(0, job.x.size(0) * job.blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++)
      for (size_t i = 0; i < views.size(); i++) {
        const int64_t b = item / job.blocks.count, block = item % job.blocks.count;
        const Rows y = views[i].rows(b, block * job.blocks.lanes, job.reversed(i));
        conv_forward_block(job, job.block(i, b, block), y, job.blocks.width(block));
      }
  });
  for (Tensor& y : outputs) y = cast(y, type);
  return outputs;
}

void conv_backward_block(const Conv& conv, Rows dy, Rows dx, float* dweights, bool add, int64_t channels, int lanes) {
  if (channels == lanes) return kernels().convolve_backward(conv, dy, dx, dweights, add);
  Carver memory{scratch(3 * (conv.length * lanes + 16))};
  const auto copy = [&](Rows from) { return padded(memory, from, conv.length, channels, lanes); };
  const Conv copied{conv.length, conv.taps, copy(conv.x), conv.weights};
  const Rows dx_copy = copy(dx);
  kernels().convolve_backward(copied, copy(dy), dx_copy, dweights, add);
  unpad(dx_copy, dx, conv.length, channels);
}

variable_list conv_backward(const ConvJob& job, at::TensorList inputs, at::TensorList dy) {
  Tensor dx = at::empty(job.x.sizes(), job.x.options().memory_format(at::MemoryFormat::Contiguous));
  const int64_t batch = job.x.size(0), columns = job.taps + 1, count = job.blocks.count, lanes = job.blocks.lanes;
  const int64_t groups = std::clamp<int64_t>(batch * job.x.size(1) / GROUP_STEPS, 1, batch);
  const View dx_view(dx);
  std::vector<Tensor> dys, sums;
  std::vector<View> dy_views;
  for (const Tensor& d : dy) {
    dys.push_back(rowwise(d));
    dy_views.emplace_back(dys.back());
    sums.push_back(at::zeros({groups, count, columns, lanes}, job.x.options()));
  }
  at::parallel_for(0, groups * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t group = item / count, block = item % count;
      for (int64_t b = group * batch / groups; b < (group + 1) * batch / groups; b++)
        for (size_t i = 0; i < sums.size(); i++)
          conv_backward_block(job.block(i, b, block), dy_views[i].rows(b, block * lanes, job.reversed(i)),
                              dx_view.rows(b, block * lanes, job.reversed(i)),
                              sums[i].data_ptr<float>() + item * columns * lanes, i > 0, job.blocks.width(block), lanes);
    }
  });
  variable_list out{cast(dx, inputs[0].scalar_type())};
  for (size_t i = 0; i < sums.size(); i++) {
    out.push_back(unpack(sums[i], inputs[1 + 2 * i], job.blocks, groups, columns, 0));
    out.push_back(unpack(sums[i], inputs[2 + 2 * i], job.blocks, groups, columns, job.taps));
  }
  return out;
}

struct ConvFunction : torch::autograd::Function<ConvFunction> {
  static variable_list forward(AutogradContext* context, at::TensorList inputs, bool reverse) {
    context->save_for_backward(inputs.vec());
    context->saved_data["reverse"] = reverse;
    return conv_forward(ConvJob(inputs, reverse), inputs[0].scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list dy) {
    refuse_second_order();
    const at::AutoDispatchBelowADInplaceOrView below;
    const variable_list inputs = context->get_saved_variables();
    const ConvJob job(inputs, context->saved_data["reverse"].toBool());
    variable_list gradients = conv_backward(job, inputs, dy);
    gradients.emplace_back();  // reverse has none
    return gradients;
  }
};

variable_list conv_silu(at::TensorList inputs, bool reverse) {
  if (wants_gradient(inputs)) return ConvFunction::apply(inputs, reverse);
  return conv_forward(ConvJob(inputs, reverse), inputs[0].scalar_type());
}

}  // namespace

TORCH_LIBRARY(dis_scale, library) {
  library.def("scan(Tensor[] inputs, bool reverse) -> Tensor", &scan);
  library.def("conv_silu(Tensor[] inputs, bool reverse) -> Tensor[]", &conv_silu);
  library.def("use_instruction_set(str name) -> str", &use_instruction_set);
}
