// The causal convolution with SiLU in one or two directions, with its gradient. Included by native.cpp.

struct ConvDirection {  // one direction's arrays, in the order of native.py
  View y;  // or its gradient, in the backward pass
  const float *weight, *bias;  // (channels, taps), (channels)
  float* packed;               // (blocks, taps + 1, lanes)
  float* dpacked;              // (groups of batch rows, blocks, taps + 1, lanes): zeros; written by the backward pass, as below
  float *dweight, *dbias;
};

struct ConvJob {  // in the order of native.py
  int64_t threads, poison, directions, reverse, batch, length, channels, taps, batch_groups;
  View x, dx;
  ConvDirection direction[2];

  bool reversed(size_t i) const { return i ? !reverse : reverse; }
  // The same steps in the numbering of direction i.
  Span steps_of(size_t i, Span steps) const {
    return reversed(i) ? Span{length - steps.end, length - steps.begin} : steps;
  }
  void pack_weights(const Blocks& blocks) const {
    for (int64_t i = 0; i < directions; i++) {
      pack(direction[i].weight, taps, 1.0f, blocks, taps + 1, 0, direction[i].packed);
      pack(direction[i].bias, 1, 1.0f, blocks, taps + 1, taps, direction[i].packed);
    }
  }
  Conv block(size_t i, int64_t b, int64_t block, int64_t lanes, Offset next) const {
    if (reversed(i)) next.steps = -next.steps;
    return {length, taps, x.rows(b, block * lanes, length, reversed(i)),
            direction[i].packed + block * (taps + 1) * lanes, next};
  }
};

// The steps of a chunk, extended by `before` and `after` steps within the sequence.
Span extended(Span steps, int64_t before, int64_t after, int64_t length) {
  return {std::max<int64_t>(steps.begin - before, 0), std::min(steps.end + after, length)};
}

void conv_forward_block(const Conv& conv, Rows y, Span steps, int64_t channels, int lanes, bool poison) {
  if (channels == lanes) return kernels().convolve(conv, y, steps);
  Arena memory{thread_memory(2 * ((CHUNK + conv.taps) * lanes + 16), poison)};
  const Rows x = padded(memory, conv.x, extended(steps, conv.taps - 1, 0, conv.length), channels, lanes);
  const Rows out = padded(memory, y, steps, channels, lanes);
  kernels().convolve({conv.length, conv.taps, x, conv.weights, {}}, out, steps);
  unpad(out, y, steps, channels);
}

void forward(const ConvJob& job) {
  const Blocks blocks(job.channels);
  job.pack_weights(blocks);
  for_runs(job.threads, job.batch, blocks, [&](int64_t b, Span run) {
    for_chunks(job.length, blocks.lanes, run, [&](int64_t block, Span steps, Offset next) {
      for (int64_t i = 0; i < job.directions; i++) {
        const Rows y = job.direction[i].y.rows(b, block * blocks.lanes, job.length, job.reversed(i));
        conv_forward_block(job.block(i, b, block, blocks.lanes, next), y, job.steps_of(i, steps), blocks.width(block),
                           blocks.lanes, job.poison);
      }
    });
  });
}

void conv_backward_block(const Conv& conv, Rows dy, Rows dx, float* dweights, Span steps, bool add, int64_t channels,
                         int lanes, bool poison) {
  if (channels == lanes) return kernels().convolve_backward(conv, dy, dx, dweights, steps, add);
  Arena memory{thread_memory(3 * ((CHUNK + 2 * conv.taps) * lanes + 16), poison)};
  const int64_t more = conv.taps - 1;
  const Rows x = padded(memory, conv.x, extended(steps, more, more, conv.length), channels, lanes);
  const Rows dy_copy = padded(memory, dy, extended(steps, 0, more, conv.length), channels, lanes);
  const Rows dx_copy = padded(memory, dx, steps, channels, lanes);
  kernels().convolve_backward({conv.length, conv.taps, x, conv.weights, {}}, dy_copy, dx_copy, dweights, steps, add);
  unpad(dx_copy, dx, steps, channels);
}

void backward(const ConvJob& job) {
  const Blocks blocks(job.channels);
  const int64_t batch = job.batch, columns = job.taps + 1, lanes = blocks.lanes, groups = job.batch_groups;
  job.pack_weights(blocks);
  for_runs(job.threads, groups, blocks, [&](int64_t group, Span run) {
    for (int64_t b = group * batch / groups; b < (group + 1) * batch / groups; b++)
      for_chunks(job.length, lanes, run, [&](int64_t block, Span steps, Offset next) {
        for (int64_t i = 0; i < job.directions; i++) {
          const auto rows = [&](const View& view) { return view.rows(b, block * lanes, job.length, job.reversed(i)); };
          float* dweights = job.direction[i].dpacked + (group * blocks.count + block) * columns * lanes;
          conv_backward_block(job.block(i, b, block, lanes, next), rows(job.direction[i].y), rows(job.dx), dweights,
                              job.steps_of(i, steps), i > 0, blocks.width(block), lanes, job.poison);
        }
      });
  });
  for (int64_t i = 0; i < job.directions; i++) {
    const ConvDirection& d = job.direction[i];
    unpack(d.dpacked, groups, blocks, columns, 0, job.taps, d.dweight);
    unpack(d.dpacked, groups, blocks, columns, job.taps, 1, d.dbias);
  }
}
