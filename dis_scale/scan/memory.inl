// Memory, threads, and layouts between PyTorch's tensors and the kernels. Included by native.cpp.

// Scratch memory of a thread, kept from call to call: fresh pages would cost more than a small scan. `poison` fills it with NaN.
float* thread_memory(int64_t floats, bool poison) {
  struct Free { void operator()(float* p) const { std::free(p); } };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
    if (!memory) {  // no exception leaves a thread of OpenMP
      std::fprintf(stderr, "native scan: no memory for %lld floats of scratch\n", static_cast<long long>(floats));
      std::abort();
    }
    size = floats;
  }
  if (poison) std::fill_n(memory.get(), floats, std::numeric_limits<float>::quiet_NaN());
  return memory.get();
}

// Allocates pieces of one block of memory, aligned to 64 bytes. Without memory (`at` is null) it only counts.
struct Arena {
  float* at = nullptr;
  int64_t used = 0;
  float* allocate(int64_t floats) {
    float* piece = at ? at + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return piece;
  }
};

struct View {  // a float32 tensor of (batch, length, channels), and the strides of the first two; null if there is none
  float* data;
  int64_t batch, row;
  Rows rows(int64_t b, int64_t channel, int64_t length, bool reverse) const {
    if (!data) return {};
    float* first = data + b * batch + channel;
    return reverse ? Rows{first + (length - 1) * row, -row} : Rows{first, row};
  }
};

// Odd widths: the last block of channels is computed in padded copies.

Rows padded(Arena& memory, Rows from, Span steps, int64_t channels, int lanes) {
  if (!from.at) return {};
  const Rows to{memory.allocate((steps.end - steps.begin) * lanes) - steps.begin * lanes, lanes};
  for (int64_t t = steps.begin; t < steps.end; t++) {
    std::memcpy(to[t], from[t], channels * sizeof(float));
    std::memset(to[t] + channels, 0, (lanes - channels) * sizeof(float));
  }
  return to;
}

void unpad(Rows from, Rows to, Span steps, int64_t channels) {
  for (int64_t t = steps.begin; to.at && t < steps.end; t++) std::memcpy(to[t], from[t], channels * sizeof(float));
}

// Channels in blocks of one vector each.
struct Blocks {
  int64_t channels, lanes, count;
  explicit Blocks(int64_t channels)
      : channels(channels), lanes(kernels().lanes), count((channels + lanes - 1) / lanes) {}
  int64_t width(int64_t block) const { return std::min(lanes, channels - block * lanes); }
};

// Call work(begin, end) on each thread for its share of `count` items.
template <typename Work>
void on_threads(int64_t threads, int64_t count, const Work& work) {
  const int64_t share = (count + threads - 1) / threads;
#pragma omp parallel for schedule(static, 1) if (threads > 1 && count > 1)
  for (int64_t i = 0; i < threads; i++)
    if (i * share < count) work(i * share, std::min((i + 1) * share, count));
}

// Call work(row, blocks) on all threads, for runs of consecutive blocks of each row.
template <typename Work>
void for_runs(int64_t threads, int64_t rows, const Blocks& blocks, const Work& work) {
  on_threads(threads, rows * blocks.count, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin % blocks.count, last = std::min(first + end - begin, blocks.count);
      work(begin / blocks.count, Span{first, last});
      begin += last - first;
    }
  });
}

// Where the next block of the run is. After the last block it is the first one's next chunk, `steps` steps away.
Offset offset_of_next(int64_t block, Span run, int64_t lanes, int64_t steps) {
  return block + 1 < run.end ? Offset{0, lanes} : Offset{steps, (run.begin - block) * lanes};
}

// Call work(block, steps, what to prefetch) chunk by chunk, and within a chunk block by block. So prefetched rows are still
// in the second-level cache, and their pages in the TLB, at any length of the sequence.
template <typename Work>
void for_chunks(int64_t length, int64_t lanes, Span run, const Work& work) {
  for (int64_t begin = 0; begin < length; begin += CHUNK)
    for (int64_t block = run.begin; block < run.end; block++)
      work(block, Span{begin, std::min(begin + CHUNK, length)},
           offset_of_next(block, run, lanes, begin + CHUNK < length ? CHUNK : 0));
}

// Pack parameters as vectors over a block's channels, padded with zeros: (blocks, columns, lanes). Writes `scale` times the
// `count` columns of a matrix, from column `first` on.
void pack(const float* matrix_EK, int64_t count, float scale, const Blocks& blocks, int64_t columns, int64_t first,
          float* to) {
  for (int64_t block = 0; block < blocks.count; block++)
    for (int64_t k = 0; k < count; k++) {
      float* vector = to + (block * columns + first + k) * blocks.lanes;
      const float* column = matrix_EK + block * blocks.lanes * count + k;
      for (int64_t lane = 0; lane < blocks.width(block); lane++) vector[lane] = column[lane * count] * scale;
    }
}

// The gradient of such a matrix: the partial sums of `groups` groups of batch rows, added in order.
void unpack(const float* sums, int64_t groups, const Blocks& blocks, int64_t columns, int64_t first, int64_t count,
            float* matrix_EK) {
  const int64_t group = blocks.count * columns * blocks.lanes;
  for (int64_t block = 0; block < blocks.count; block++)
    for (int64_t k = 0; k < count; k++) {
      const float* vector = sums + (block * columns + first + k) * blocks.lanes;
      float* column = matrix_EK + block * blocks.lanes * count + k;
      float sum[16] = {};
      for (int64_t g = 0; g < groups; g++)
        for (int64_t lane = 0; lane < blocks.lanes; lane++) sum[lane] += vector[g * group + lane];
      for (int64_t lane = 0; lane < blocks.width(block); lane++) column[lane * count] = sum[lane];
    }
}

// Add the other parts to the first one, in order.
void sum_parts(int64_t threads, int64_t parts, int64_t count, float* at) {
  if (parts > 1)
    on_threads(threads, count, [&](int64_t begin, int64_t end) {
      for (int64_t p = 1; p < parts; p++)
        for (int64_t i = begin; i < end; i++) at[i] += at[p * count + i];
    });
}
