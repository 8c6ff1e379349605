// The scan in one or two directions, with its gradient. Included by native.cpp.

constexpr int64_t GROUP_CHANNELS = 192;  // share one partial sum of dB and dC: these take 1/6 of u's memory at 16 states
constexpr int64_t GROUP_STEPS = 128;     // the least that share one partial sum of dA: these take at most 1/7 of u's memory

struct Direction {
  Tensor u, delta, B, C, weights, starts;
  bool reverse;
  View u_view, delta_view, B_view, C_view;

  // `kept`: weights and starts of a forward pass, or empty.
  Direction(at::TensorList inputs, bool reverse, const Blocks& blocks, at::TensorList kept)
      : u(rowwise(inputs[0])), delta(rowwise(inputs[1])), B(rowwise(inputs[3])), C(rowwise(inputs[4])),
        reverse(reverse), u_view(u), delta_view(delta), B_view(B), C_view(C) {
    if (!kept.empty()) {
      weights = kept[0], starts = kept[1];
      TORCH_CHECK(weights.size(2) == blocks.lanes, "the instruction set changed between forward and backward");
      return;
    }
    const int64_t states = B.size(2);
    weights = at::zeros({blocks.count, states + 2, blocks.lanes}, u.options());
    pack(inputs[2], 1.4426950408889634f, blocks, states + 2, 0, weights.data_ptr<float>());
    pack(inputs[5], 1.0f, blocks, states + 2, states, weights.data_ptr<float>());
    pack(inputs[6], 1.0f, blocks, states + 2, states + 1, weights.data_ptr<float>());
  }

  Scan block(int64_t b, int64_t block, const Blocks& blocks, const View& z, Offset next) const {
    const int64_t channel = block * blocks.lanes;
    return {B.size(2),
            u_view.rows(b, channel, reverse),
            delta_view.rows(b, channel, reverse),
            B_view.rows(b, 0, reverse),
            C_view.rows(b, 0, reverse),
            z.rows(b, channel, reverse),
            weights.data_ptr<float>() + block * (B.size(2) + 2) * blocks.lanes,
            starts.defined() ? starts.data_ptr<float>() + b * starts.stride(0) + block * starts.stride(2) : nullptr,
            starts.defined() ? starts.stride(1) : 0,
            next};
  }
};

// The inputs of the operator: seven tensors per direction, then the gate z, if any.
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
    return at::empty({batch(), (length() - 1) / CHUNK, blocks.count, states(), blocks.lanes},
                     directions[0].weights.options());
  }
};

void pad(Arena& memory, Scan& s, Span steps, int64_t channels, int lanes) {
  s.u = padded(memory, s.u, steps, channels, lanes);
  s.delta = padded(memory, s.delta, steps, channels, lanes);
  s.z = padded(memory, s.z, steps, channels, lanes);
}

void forward_block(const Job& job, size_t i, const View& y, int64_t b, int64_t block, float* h, Span steps, Offset next,
                   Arena memory) {
  const int lanes = job.blocks.lanes;
  const int64_t channels = job.blocks.width(block);
  const Direction& direction = job.directions[i];
  Scan scan = direction.block(b, block, job.blocks, i + 1 == job.directions.size() ? job.z_view : View(), next);
  const Rows out = y.rows(b, block * lanes, direction.reverse);
  if (channels == lanes) return kernels().forward(scan, out, h, steps, i > 0);
  pad(memory, scan, steps, channels, lanes);
  const Rows copy = padded(memory, out, steps, channels, lanes);
  kernels().forward(scan, copy, h, steps, i > 0);
  unpad(copy, out, steps, channels);
}

Tensor scan_forward(const Job& job) {
  const Tensor& u = job.directions[0].u;
  Tensor y = at::empty(u.sizes(), u.options().memory_format(at::MemoryFormat::Contiguous));
  const View view(y);
  const int64_t lanes = job.blocks.lanes, states = job.states() * lanes;
  for_runs(job.batch(), job.blocks, [&](int64_t b, Span run) {
    const int64_t state_floats = (run.end - run.begin) * states;
    Arena memory{thread_memory(state_floats + 16 + 4 * (CHUNK * lanes + 16))};
    float* h = memory.allocate(state_floats);
    for (size_t i = 0; i < job.directions.size(); i++) {
      std::fill_n(h, state_floats, 0.0f);
      for_chunks(job.length(), lanes, run, [&](int64_t block, Span steps, Offset next) {
        forward_block(job, i, view, b, block, h + (block - run.begin) * states, steps, next, memory);
      });
    }
  });
  return y;
}

// One direction's gradients: du and ddelta complete, dB and dC as one part per group of channels, dweights as one part per
// group of batch rows.
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
  Tensor sum = at::empty_like(parts[0]);
  const float* from = parts.data_ptr<float>();
  float* to = sum.data_ptr<float>();
  const int64_t count = sum.numel();
  at::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) to[i] = from[i] + from[count + i];
    for (int64_t g = 2; g < parts.size(0); g++)
      for (int64_t i = begin; i < end; i++) to[i] += from[g * count + i];
  });
  return sum;
}

class Backward {
 public:
  // `out` is the output of the forward pass; used only if there is a gate.
  Backward(const Job& job, const Tensor& out, const Tensor& dy)
      : job(job), dy(rowwise(dy)), dy_view(this->dy), lanes(job.blocks.lanes), length(job.length()),
        states(job.states()), groups((job.blocks.channels + GROUP_CHANNELS - 1) / GROUP_CHANNELS),
        batch_groups(std::clamp<int64_t>(job.batch() * length / GROUP_STEPS, 1, job.batch())) {
    for (const Direction& direction : job.directions) sums.emplace_back(direction, groups, batch_groups);
    if (job.z.defined()) {
      dz = at::empty(job.z.sizes(), job.z.options().memory_format(at::MemoryFormat::Contiguous));
      dz_view = View(dz), out_view = View(out);
    }
  }

  void run() {
    at::parallel_for(0, groups * batch_groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; item++) work(item / groups, item % groups);
    });
  }

  // In the order and the dtypes of the operator's inputs.
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
  View dy_view, dz_view, out_view;
  int64_t lanes, length, states, groups, batch_groups;
  std::vector<Sums> sums;

  int64_t folded() const { return (states + 3) / 4 * CHUNK * lanes; }
  int64_t group_blocks() const { return GROUP_CHANNELS / lanes; }

  Scratch allocate_scratch(Arena& memory) const {
    Scratch scratch{memory.allocate(CHUNK * 4 * lanes), memory.allocate((CHUNK + 1) * 4 * lanes)};
    for (float** piece : {&scratch.delta, &scratch.delta_u, &scratch.slope, &scratch.dy, &scratch.d_delta_u,
                          &scratch.d_delta})
      *piece = memory.allocate(CHUNK * lanes);
    scratch.dB = memory.allocate(folded());
    scratch.dC = memory.allocate(folded());
    scratch.carry = memory.allocate(group_blocks() * states * lanes);
    return scratch;
  }

  // One group of batch rows and one group of channels, from the last chunk to the first. All the group's blocks of a chunk
  // are processed together, so the sums over them stay in the caches at any length of the sequence.
  void work(int64_t batch_group, int64_t group) {
    Arena count;
    allocate_scratch(count);
    Arena memory{thread_memory(count.used + 8 * (CHUNK * lanes + 16))};
    const Scratch scratch = allocate_scratch(memory);
    for (int64_t b = batch_group * job.batch() / batch_groups; b < (batch_group + 1) * job.batch() / batch_groups; b++)
      for (size_t i = 0; i < sums.size(); i++) {
        std::fill_n(scratch.carry, group_blocks() * states * lanes, 0.0f);
        for (int64_t begin = (length - 1) / CHUNK * CHUNK; begin >= 0; begin -= CHUNK)
          one_chunk(i, b, batch_group, group, {begin, std::min(begin + CHUNK, length)}, scratch, memory);
      }
  }

  void one_chunk(size_t i, int64_t b, int64_t batch_group, int64_t group, Span steps, Scratch scratch, Arena memory) {
    const int64_t first = group * group_blocks();
    const Span run{first, std::min(first + group_blocks(), job.blocks.count)};
    for (int64_t block = run.begin; block < run.end; block++) {
      scratch.accumulate = block > run.begin;
      const Offset next = offset_of_next(block, run, lanes, steps.begin ? -CHUNK : 0);
      one_block(i, b, batch_group, block, steps, scratch, memory, next);
      scratch.carry += states * lanes;
    }
    const int64_t matrix = (group * job.batch() + b) * length * states;
    collect(scratch.dB, sums[i].dB.data_ptr<float>() + matrix, steps, job.directions[i].reverse);
    collect(scratch.dC, sums[i].dC.data_ptr<float>() + matrix, steps, job.directions[i].reverse);
  }

  void one_block(size_t i, int64_t b, int64_t batch_group, int64_t block, Span steps, const Scratch& scratch,
                 Arena memory, Offset next) {
    const Direction& direction = job.directions[i];
    Scan scan = direction.block(b, block, job.blocks, job.z_view, next);
    const int64_t channel = block * lanes, channels = job.blocks.width(block), columns = states + 2;
    const auto rows = [&](const View& view) { return view.rows(b, channel, direction.reverse); };
    const Gradients out{rows(dy_view), rows(sums[i].du_view), rows(sums[i].ddelta_view),
                        i ? Rows{} : rows(dz_view), i ? Rows{} : rows(out_view),
                        sums[i].dweights.data_ptr<float>() +
                            (batch_group * job.blocks.count + block) * columns * lanes};
    if (channels == lanes) return kernels().backward(scan, out, scratch, steps);
    pad(memory, scan, steps, channels, lanes);
    const auto copy = [&](Rows from) { return padded(memory, from, steps, channels, lanes); };
    const Gradients copies{copy(out.y), copy(out.u), copy(out.delta), copy(out.z), copy(out.out), out.weights};
    kernels().backward(scan, copies, scratch, steps);
    unpad(copies.u, out.u, steps, channels);
    unpad(copies.delta, out.delta, steps, channels);
    unpad(copies.z, out.z, steps, channels);
  }

  void collect(const float* vectors, float* to, Span steps, bool reverse) const {
    for (int64_t t = steps.begin; t < steps.end; t++)
      kernels().sum_lanes(vectors + (t - steps.begin) * lanes, CHUNK * lanes,
                          to + (reverse ? length - 1 - t : t) * states, states);
  }
};

struct ScanFunction : torch::autograd::Function<ScanFunction> {
  static Tensor forward(AutogradContext* context, at::TensorList inputs, bool reverse) {
    Job job(inputs, reverse);
    variable_list saved = inputs.vec();
    for (Direction& direction : job.directions) {
      direction.starts = job.new_starts();
      saved.insert(saved.end(), {direction.weights, direction.starts});
    }
    const Tensor y = scan_forward(job);
    if (job.z.defined()) saved.push_back(y);
    context->save_for_backward(std::move(saved));
    context->saved_data["reverse"] = reverse;
    return cast(y, inputs[0].scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list dy) {
    refuse_second_order();
    const at::AutoDispatchBelowADInplaceOrView below;
    const variable_list saved = context->get_saved_variables();
    // Per direction: seven inputs, weights and starts. With a gate: z, the last input, and the output of the forward pass.
    const size_t directions = saved.size() / 9, gate = saved.size() % 9 / 2;
    const at::TensorList all(saved), inputs = all.slice(0, 7 * directions + gate);
    const Job job(inputs, context->saved_data["reverse"].toBool(), all.slice(inputs.size(), 2 * directions));
    Backward backward(job, saved.back(), dy[0]);
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
