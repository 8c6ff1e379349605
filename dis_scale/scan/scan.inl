// The scan in one or two directions, with its gradient. Included by native.cpp.

struct Direction {  // one direction's arrays, in the order of native.py
  View u, delta, B, C;
  const float *A, *D, *bias;  // (channels, states), (channels), (channels)
  float* weights;             // (blocks, states + 2, lanes): packed by the forward pass, kept for the backward pass
  float* starts;              // (batch, chunks - 1, blocks, states, lanes): kept likewise; null if no gradient is needed
  View du, ddelta;            // written by the backward pass, as all below
  float *dB, *dC;             // (groups of channels, batch, length, states): the first group's becomes the sum
  float* dweights;            // (groups of batch rows, blocks, states + 2, lanes): zeros
  float *dA, *dD, *dbias;
};

struct ScanJob {  // in the order of native.py
  int64_t threads, poison, directions, reverse, batch, length, channels, states, batch_groups;
  View z, y, dz, dy;  // z is null if there is no gate
  Direction direction[2];

  bool reversed(size_t i) const { return i ? !reverse : reverse; }

  Scan block(size_t i, int64_t b, int64_t block, const Blocks& blocks, bool gated, Offset next) const {
    const Direction& d = direction[i];
    const int64_t channel = block * blocks.lanes, one_start = blocks.count * states * blocks.lanes;
    const auto rows = [&](const View& view, int64_t first) { return view.rows(b, first, length, reversed(i)); };
    float* starts = d.starts ? d.starts + b * ((length - 1) / CHUNK) * one_start + block * states * blocks.lanes : nullptr;
    return {states, rows(d.u, channel), rows(d.delta, channel), rows(d.B, 0), rows(d.C, 0),
            gated ? rows(z, channel) : Rows{}, d.weights + block * (states + 2) * blocks.lanes, starts, one_start, next};
  }
};

void pad(Arena& memory, Scan& s, Span steps, int64_t channels, int lanes) {
  s.u = padded(memory, s.u, steps, channels, lanes);
  s.delta = padded(memory, s.delta, steps, channels, lanes);
  s.z = padded(memory, s.z, steps, channels, lanes);
}

void forward_block(const ScanJob& job, const Blocks& blocks, size_t i, int64_t b, int64_t block, float* h, Span steps,
                   Offset next, Arena memory) {
  const int lanes = blocks.lanes;
  const int64_t channels = blocks.width(block);
  Scan scan = job.block(i, b, block, blocks, i + 1 == size_t(job.directions), next);
  const Rows out = job.y.rows(b, block * lanes, job.length, job.reversed(i));
  if (channels == lanes) return kernels().forward(scan, out, h, steps, i > 0);
  pad(memory, scan, steps, channels, lanes);
  const Rows copy = padded(memory, out, steps, channels, lanes);
  kernels().forward(scan, copy, h, steps, i > 0);
  unpad(copy, out, steps, channels);
}

void forward(const ScanJob& job) {
  const Blocks blocks(job.channels);
  const int64_t lanes = blocks.lanes, states = job.states * lanes, columns = job.states + 2;
  for (int64_t i = 0; i < job.directions; i++) {
    const Direction& d = job.direction[i];
    pack(d.A, job.states, 1.4426950408889634f, blocks, columns, 0, d.weights);
    pack(d.D, 1, 1.0f, blocks, columns, job.states, d.weights);
    pack(d.bias, 1, 1.0f, blocks, columns, job.states + 1, d.weights);
  }
  for_runs(job.threads, job.batch, blocks, [&](int64_t b, Span run) {
    const int64_t state_floats = (run.end - run.begin) * states;
    Arena memory{thread_memory(state_floats + 16 + 4 * (CHUNK * lanes + 16), job.poison)};
    float* h = memory.allocate(state_floats);
    for (int64_t i = 0; i < job.directions; i++) {
      std::fill_n(h, state_floats, 0.0f);
      for_chunks(job.length, lanes, run, [&](int64_t block, Span steps, Offset next) {
        forward_block(job, blocks, i, b, block, h + (block - run.begin) * states, steps, next, memory);
      });
    }
  });
}

class Backward {
 public:
  explicit Backward(const ScanJob& job)
      : job(job), blocks(job.channels), lanes(blocks.lanes), length(job.length), states(job.states),
        groups((job.channels + GROUP_CHANNELS - 1) / GROUP_CHANNELS), batch_groups(job.batch_groups) {}

  void run() {
    on_threads(job.threads, groups * batch_groups, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; item++) work(item / groups, item % groups);
    });
    for (int64_t i = 0; i < job.directions; i++) {
      const Direction& d = job.direction[i];
      for (float* parts : {d.dB, d.dC}) sum_parts(job.threads, groups, job.batch * length * states, parts);
      const auto unpacked = [&](int64_t first, int64_t count, float* matrix) {
        unpack(d.dweights, batch_groups, blocks, states + 2, first, count, matrix);
      };
      unpacked(0, states, d.dA), unpacked(states, 1, d.dD), unpacked(states + 1, 1, d.dbias);
    }
  }

 private:
  const ScanJob& job;
  const Blocks blocks;
  const int64_t lanes, length, states, groups, batch_groups;

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
    Arena memory{thread_memory(count.used + 8 * (CHUNK * lanes + 16), job.poison)};
    const Scratch scratch = allocate_scratch(memory);
    for (int64_t b = batch_group * job.batch / batch_groups; b < (batch_group + 1) * job.batch / batch_groups; b++)
      for (int64_t i = 0; i < job.directions; i++) {
        std::fill_n(scratch.carry, group_blocks() * states * lanes, 0.0f);
        for (int64_t begin = (length - 1) / CHUNK * CHUNK; begin >= 0; begin -= CHUNK)
          one_chunk(i, b, batch_group, group, {begin, std::min(begin + CHUNK, length)}, scratch, memory);
      }
  }

  void one_chunk(size_t i, int64_t b, int64_t batch_group, int64_t group, Span steps, Scratch scratch, Arena memory) {
    const int64_t first = group * group_blocks();
    const Span run{first, std::min(first + group_blocks(), blocks.count)};
    for (int64_t block = run.begin; block < run.end; block++) {
      scratch.accumulate = block > run.begin;
      const Offset next = offset_of_next(block, run, lanes, steps.begin ? -CHUNK : 0);
      one_block(i, b, batch_group, block, steps, scratch, memory, next);
      scratch.carry += states * lanes;
    }
    const int64_t matrix = (group * job.batch + b) * length * states;
    collect(scratch.dB, job.direction[i].dB + matrix, steps, job.reversed(i));
    collect(scratch.dC, job.direction[i].dC + matrix, steps, job.reversed(i));
  }

  void one_block(size_t i, int64_t b, int64_t batch_group, int64_t block, Span steps, const Scratch& scratch,
                 Arena memory, Offset next) {
    const Direction& d = job.direction[i];
    Scan scan = job.block(i, b, block, blocks, true, next);
    const int64_t channel = block * lanes, channels = blocks.width(block), columns = states + 2;
    const auto rows = [&](const View& view) { return view.rows(b, channel, length, job.reversed(i)); };
    const Gradients out{rows(job.dy), rows(d.du), rows(d.ddelta), i ? Rows{} : rows(job.dz), i ? Rows{} : rows(job.y),
                        d.dweights + (batch_group * blocks.count + block) * columns * lanes};
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
