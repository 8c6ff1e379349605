// Memory, views and layouts between PyTorch's tensors and the kernels. Included by native.cpp.

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

// Scratch memory of a thread, kept from call to call: fresh pages would cost more than a small scan.
float* thread_memory(int64_t floats) {
  struct Free { void operator()(float* p) const { std::free(p); } };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
    TORCH_CHECK(memory, "selective scan: no memory for ", floats, " floats of scratch");
    size = floats;
  }
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())
    std::fill_n(memory.get(), floats, std::numeric_limits<float>::quiet_NaN());
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

Tensor cast(const Tensor& x, at::ScalarType type) { return x.scalar_type() == type ? x : x.to(type); }

// x in float32 with contiguous channels; a copy only if necessary.
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

// Call work(row, blocks) on all threads, for runs of consecutive blocks of each row.
template <typename Work>
void for_runs(int64_t rows, const Blocks& blocks, const Work& work) {
  at::parallel_for(0, rows * blocks.count, 1, [&](int64_t begin, int64_t end) {
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
// columns of matrix_EK, from column `first` on.
void pack(const Tensor& matrix_EK, float scale, const Blocks& blocks, int64_t columns, int64_t first, float* to) {
  const Tensor floats = cast(matrix_EK, at::kFloat).contiguous();
  const float* from = floats.data_ptr<float>();
  const int64_t count = floats.numel() / blocks.channels;
  for (int64_t block = 0; block < blocks.count; block++)
    for (int64_t k = 0; k < count; k++) {
      float* vector = to + (block * columns + first + k) * blocks.lanes;
      const float* column = from + block * blocks.lanes * count + k;
      for (int64_t lane = 0; lane < blocks.width(block); lane++) vector[lane] = column[lane * count] * scale;
    }
}

// The gradient of such a matrix: the partial sums of `groups` groups of batch rows, added in order.
Tensor unpack(const Tensor& sums, const Tensor& like, const Blocks& blocks, int64_t groups, int64_t columns,
              int64_t first) {
  Tensor out = at::empty(like.sizes(), like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  const int64_t count = out.numel() / blocks.channels, group = blocks.count * columns * blocks.lanes;
  const float* from = sums.data_ptr<float>();
  float* to = out.data_ptr<float>();
  for (int64_t block = 0; block < blocks.count; block++)
    for (int64_t k = 0; k < count; k++) {
      const float* vector = from + (block * columns + first + k) * blocks.lanes;
      float* column = to + block * blocks.lanes * count + k;
      float sum[16] = {};
      for (int64_t g = 0; g < groups; g++)
        for (int64_t lane = 0; lane < blocks.lanes; lane++) sum[lane] += vector[g * group + lane];
      for (int64_t lane = 0; lane < blocks.width(block); lane++) column[lane * count] = sum[lane];
    }
  return cast(out, like.scalar_type());
}
