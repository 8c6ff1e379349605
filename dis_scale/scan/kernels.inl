// The arithmetic of the scan and of the convolution, for one batch row and LANES channels, step by step in time.
// native.cpp includes this file once per instruction set, inside a namespace, with NAME and LANES defined. This file calls
// neither PyTorch nor the standard library, so that no code compiled for one processor is linked into another's.
//
// A direction is the sign of a stride: a reversed scan is a view that begins at the last row and has a negative stride.
// Symbols as in Gu and Dao 2023: h the state, u the input, delta the step, A, B, C, D. `N` states, `K` taps.
//
// recompute_states computes a chunk's decays and states again from the state at its beginning; backpropagate_states then
// goes through the same steps in reverse order and accumulates gradients. chunked.py and triton_scan.py use these names.

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float* at) { return *reinterpret_cast<const unaligned_vec*>(at); }
INLINE void store(float* at, vec x) { *reinterpret_cast<unaligned_vec*>(at) = x; }
INLINE vec splat(float x) { return x + vec{}; }

template <int P0, int P1, int P2, int P3, int... LANE>
INLINE vec shuffle(vec x, vec y, std::integer_sequence<int, LANE...>) {
  constexpr int from[] = {P0, P1, P2, P3};
  return __builtin_shuffle(x, y, ivec{(LANE / 4 * 4 + from[LANE % 4] % 4 + from[LANE % 4] / 4 * LANES)...});
}

// In each group of four lanes: the indices 0..3 select from x, 4..7 from y.
template <int P0, int P1, int P2, int P3>
INLINE vec shuffle(vec x, vec y) {
  return shuffle<P0, P1, P2, P3>(x, y, std::make_integer_sequence<int, LANES>());
}

// Reduce four vectors to one: in each group of four lanes, lane j becomes the sum of these lanes of x[j].
INLINE vec fold(const vec* x) {
  const vec a = shuffle<0, 4, 1, 5>(x[0], x[1]) + shuffle<2, 6, 3, 7>(x[0], x[1]);
  const vec b = shuffle<0, 4, 1, 5>(x[2], x[3]) + shuffle<2, 6, 3, 7>(x[2], x[3]);
  return shuffle<0, 1, 4, 5>(a, b) + shuffle<2, 3, 6, 7>(a, b);
}

#if LANES == 16

// 2^(i/16) / POWER_OF_0, rounded once, in one register; times 2 or 4 to make up for SHIFT in the exponent. POWER_OF_0 is
// the cubic below at f = 0.
constexpr float SHIFT = 1.4375f, POWER_OF_0 = 17.95180892944336f;  // rounding its inverse adds an error of 1e-9
struct Roots {
  float at[16];
  constexpr Roots() : at() {
    double root = 4.0 / POWER_OF_0;
    for (int i = 0; i < 16; i++, root *= 1.0442737824274138) at[i] = static_cast<float>(i < 7 ? root : root / 2);
  }
};
alignas(64) static constexpr Roots ROOTS;

// 2^x. x is split into a multiple of 1/16, whose fraction's power is in a table, and a remainder f of at most 1/32. 2^f
// is a cubic (relative error 4.2e-8). Written in g = f + SHIFT, with SHIFT near 1 / ln 2, it has no square term, and the table
// contains its leading factor. That saves operations: multiplications and additions both limit the speed. A table of two
// registers would limit it too: its shuffle takes a multiplier's cycle on Zen 4. The relative error of the result is at
// most 2.7e-7. The result is exactly 1 at 0, and has no bias near 0, which a slow decay would accumulate. NaN stays NaN.
INLINE vec exp2(vec x) {
  const vec roots = *reinterpret_cast<const vec*>(ROOTS.at);
  asm("" : "+v"(x));  // keeps the next sums from being fused with the product that made x: each would cost a multiplication more
  const vec index = x + splat(786432.0f);  // 1.5 * 2^23 / 16: rounds to the multiple; the lowest bits are the fraction
  const vec shifted = index - splat(786432.0f + SHIFT), g = x - shifted;
  const vec root = (vec)_mm512_permutexvar_ps((__m512i)index, (__m512)roots);
  const vec p = (g * g + 6.244026184082031f) * g + 6.005561828613281f;
  return (vec)_mm512_scalef_ps((__m512)(p * root), (__m512)shifted);  // uses the integer part of `shifted`
}

#else

// Clamp x; NaN stays NaN.
INLINE vec clamp(vec least, vec most, vec x) {
#if LANES == 8
  return (vec)_mm256_max_ps((__m256)least, _mm256_min_ps((__m256)most, (__m256)x));
#else
  return x < least ? least : x > most ? most : x;
#endif
}

// 2^x, clamped to [2^-125, 2^126]. 2^f - 1 on [-1/2, 1/2] is a minimax polynomial without a constant term (Remez exchange):
// relative error 9.2e-8, and 1.1e-7 with the coefficients rounded to float32. Exactly 1 at 0, as above. NaN stays NaN.
INLINE vec exp2(vec x) {
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  x = clamp(splat(-125.0f), splat(126.0f), x);
  const vec rounded = x + shift, f = x - (rounded - shift);
  vec p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return (vec)((ivec)p + ((ivec)rounded << 23));
}

#endif

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

INLINE vec positive(vec x) { return x < 0.0f ? vec{} : x; }
INLINE vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }

// log(1 + t) for t in [0, 1]: t times a polynomial of degree 8. It is the minimax approximation of log(1 + t) / t for the
// relative error (Remez exchange): 3.0e-8, and 9.7e-8 with the coefficients rounded to float32. triton_tiles.py's _softplus
// has the same coefficients.
INLINE vec log1p(vec t) {
  vec p = t * 0.005232630763202906f - 0.029504967853426933f;
  p = p * t + 0.07822547852993011f;
  p = p * t - 0.1366320252418518f;
  p = p * t + 0.19105982780456543f;
  p = p * t - 0.24842974543571472f;
  p = p * t + 0.3331909477710724f;
  p = p * t - 0.4999949336051941f;
  p = p * t + 0.9999999403953552f;
  return p * t;
}

struct ValueAndSlope {
  vec value, slope;
};

INLINE ValueAndSlope softplus_and_slope(vec x) {
  const vec e = exp2(magnitude(x) * -LOG2E);
  return {positive(x) + log1p(e), (x < 0.0f ? e : splat(1.0f)) / (1.0f + e)};
}

INLINE vec softplus(vec x) { return softplus_and_slope(x).value; }

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp2(x * -LOG2E)); }

INLINE vec silu(vec x) { return x * sigmoid(x); }

INLINE vec silu_slope(vec x) {
  const vec gate = sigmoid(x);
  return gate * (1.0f + x * (1.0f - gate));
}

// The gate's gradient divides the output by the gate to get y, so the gate must not be 0: a smaller |z| becomes 1e-30.
INLINE vec away_from_zero(vec z) { return magnitude(z) < 1e-30f ? splat(1e-30f) : z; }

// The gate and the slope of its logarithm. If silu is so small that the output is 0, z's gradient is 0 too.
INLINE ValueAndSlope gate_and_log_slope(vec z) {
  const vec gate = sigmoid(z);
  return {z * gate, 1.0f / z + (1.0f - gate)};
}

// The rows of a wide matrix are pages apart, and the processor's own prefetching does not cross pages. So the rows of the
// next block are prefetched while this block is computed. An address past the end does no harm.
INLINE void prefetch(Rows rows, int64_t t, Offset next) {
  if (rows.at) __builtin_prefetch(rows[t + next.steps] + next.channels, 0, 2);
}

// write(t, f(read(t))) for each step, four interleaved: a processor's window holds only one or two of f's long chains of
// dependent operations. So everything that needs no state is computed first, a chunk at a time.
template <typename Read, typename F, typename Write>
INLINE void map(int64_t begin, int64_t end, Read read, F f, Write write) {
  int64_t t = begin;
  for (; t + 4 <= end; t += 4) {
    const auto x0 = read(t), x1 = read(t + 1), x2 = read(t + 2), x3 = read(t + 3);
    const auto y0 = f(x0), y1 = f(x1), y2 = f(x2), y3 = f(x3);
    write(t, y0), write(t + 1, y1), write(t + 2, y2), write(t + 3, y3);
  }
  for (; t < end; t++) write(t, f(read(t)));
}

// The states at the beginning of a chunk; the first chunk has none.
INLINE float* start_of(const Scan& s, int64_t begin) { return s.starts + (begin / CHUNK - 1) * s.start_stride; }

// FIXED is the number of states if the compiler is to unroll over it; 0 allows any number up to MOST_STATES.
template <int FIXED>
static void scan_forward(const Scan& s, Rows out, float* carry, Span steps, bool add) {
  const int N = FIXED ? FIXED : s.states;
  const vec D = load(s.weights + N * LANES), bias = load(s.weights + (N + 1) * LANES);
  vec h[FIXED ? FIXED : MOST_STATES], deltas[CHUNK];
  for (int n = 0; n < N; n++) h[n] = load(carry + n * LANES);
  for (int n = 0; steps.begin && s.starts && n < N; n++) store(start_of(s, steps.begin) + n * LANES, h[n]);
  map(steps.begin, steps.end, [&](int64_t t) { return load(s.delta[t]) + bias; }, softplus,
      [&](int64_t t, vec delta) { deltas[t - steps.begin] = delta; });
  for (int64_t t = steps.begin; t < steps.end; t++) {
    prefetch(s.u, t, s.next), prefetch(s.delta, t, s.next), prefetch(s.z, t, s.next), prefetch(out, t, s.next);
    const vec u = load(s.u[t]), delta = deltas[t - steps.begin], delta_u = delta * u;
    const float *__restrict B = s.B[t], *__restrict C = s.C[t];
    vec y = D * u;
    if (add) y += load(out[t]);
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) {
      h[n] = exp2(delta * load(s.weights + n * LANES)) * h[n] + delta_u * B[n];
      y += h[n] * C[n];
    }
    store(out[t], y);
  }
  if (s.z.at)
    map(steps.begin, steps.end, [&](int64_t t) { return away_from_zero(load(s.z[t])); }, silu,
        [&](int64_t t, vec gate) { store(out[t], load(out[t]) * gate); });
  for (int n = 0; n < N; n++) store(carry + n * LANES, h[n]);
}

// Compute what all states of a step share: delta, its derivative by the raw delta, y's gradient before the gate. Also
// write z's gradient.
INLINE void prepare_steps(const Scan& s, const Gradients& g, const Scratch& w, int64_t begin, int64_t end) {
  const vec bias = load(s.weights + (s.states + 1) * LANES);
  map(begin, end, [&](int64_t t) { return load(s.delta[t]) + bias; }, softplus_and_slope,
      [&](int64_t t, ValueAndSlope delta) {
        const int64_t row = (t - begin) * LANES;
        store(w.delta + row, delta.value);
        store(w.delta_u + row, delta.value * load(s.u[t]));
        store(w.slope + row, delta.slope);
        if (!s.z.at) store(w.dy + row, load(g.y[t]));
      });
  const auto z = [&](int64_t t) { return away_from_zero(load(s.z[t])); };
  if (g.z.at)
    map(begin, end, z, gate_and_log_slope, [&](int64_t t, ValueAndSlope gate) {
      const vec d_out = load(g.y[t]);
      store(w.dy + (t - begin) * LANES, d_out * gate.value);
      store(g.z[t], d_out * load(g.out[t]) * gate.slope);
    });
  else if (s.z.at)
    map(begin, end, z, silu, [&](int64_t t, vec gate) { store(w.dy + (t - begin) * LANES, load(g.y[t]) * gate); });
}

// Compute a chunk's decays and states again, for COUNT states from `first` on. The registers of backpropagate_states limit
// COUNT.
template <int COUNT>
static void recompute_states(const Scan& s, const Gradients& g, const Scratch& w, int first, int64_t begin, int64_t end) {
  const Rows streams[][2] = {{s.u, s.delta}, {g.y, s.z}, {g.u, g.delta}, {g.z, g.out}};
  const Rows *next = streams[first / 4 % 4];
  const float* start = start_of(s, begin) + first * LANES;
  vec h[COUNT], A[COUNT];
  for (int i = 0; i < COUNT; i++) {
    h[i] = begin ? load(start + i * LANES) : vec{};
    A[i] = load(s.weights + (first + i) * LANES);
    store(w.states + i * LANES, h[i]);
  }
  for (int64_t t = begin; t < end; t++) {
    const int64_t row = (t - begin) * LANES;
    const vec delta = load(w.delta + row), delta_u = load(w.delta_u + row);
    const float* __restrict B = s.B[t] + first;
    float *decay = w.decays + row * COUNT, *state = w.states + (row + LANES) * COUNT;
    prefetch(next[0], t, s.next), prefetch(next[1], t, s.next);
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) {
      const vec a = exp2(delta * A[i]);
      h[i] = a * h[i] + delta_u * B[i];
      store(decay + i * LANES, a);
      store(state + i * LANES, h[i]);
    }
  }
}

// Go through the same steps in reverse order and add to the sums over the states. `carry` is the gradient that the later
// steps pass to the state.
template <int COUNT>
static void backpropagate_states(const Scan& s, const Gradients& g, const Scratch& w, int first, int64_t begin, int64_t end) {
  vec carry[COUNT], A[COUNT], dA[COUNT];
  for (int i = 0; i < COUNT; i++) {
    carry[i] = load(w.carry + (first + i) * LANES);
    A[i] = load(s.weights + (first + i) * LANES);
    dA[i] = load(g.weights + (first + i) * LANES);
  }
  for (int64_t t = end - 1; t >= begin; t--) {
    const int64_t row = (t - begin) * LANES;
    const vec delta = load(w.delta + row), delta_u = load(w.delta_u + row), dy = load(w.dy + row);
    const float *B = s.B[t] + first, *C = s.C[t] + first, *decay = w.decays + row * COUNT, *state = w.states + row * COUNT;
    vec d_delta_u = first ? load(w.d_delta_u + row) : vec{}, d_delta = first ? load(w.d_delta + row) : vec{};
    vec b[4] = {}, c[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) {
      const vec dh = carry[i] + dy * C[i];
      c[i] = dy * load(state + (COUNT + i) * LANES);
      b[i] = dh * delta_u;
      d_delta_u += dh * B[i];
      carry[i] = dh * load(decay + i * LANES);
      const vec d_exponent = carry[i] * load(state + i * LANES);
      d_delta += d_exponent * A[i];
      dA[i] += d_exponent * delta;
    }
    store(w.d_delta_u + row, d_delta_u);
    store(w.d_delta + row, d_delta);
    float *dB = w.dB + first / 4 * CHUNK * LANES + row, *dC = w.dC + first / 4 * CHUNK * LANES + row;
    store(dB, w.accumulate ? load(dB) + fold(b) : fold(b));
    store(dC, w.accumulate ? load(dC) + fold(c) : fold(c));
  }
  for (int i = 0; i < COUNT; i++) {
    store(w.carry + (first + i) * LANES, carry[i]);
    store(g.weights + (first + i) * LANES, dA[i]);
  }
}

template <int COUNT>
static void backward_states(const Scan& s, const Gradients& g, const Scratch& w, int first, int64_t begin, int64_t end) {
  recompute_states<COUNT>(s, g, w, first, begin, end);
  backpropagate_states<COUNT>(s, g, w, first, begin, end);
}

// Turn the sums over the states into the gradients of u, delta, D and delta's bias.
INLINE void store_gradients(const Scan& s, const Gradients& g, const Scratch& w, int64_t begin, int64_t end) {
  float *D_at = g.weights + s.states * LANES, *bias_at = D_at + LANES;
  const vec D = load(s.weights + s.states * LANES);
  vec dD = load(D_at), dbias = load(bias_at);
  for (int64_t t = begin; t < end; t++) {
    const int64_t row = (t - begin) * LANES;
    const vec u = load(s.u[t]), dy = load(w.dy + row), d_delta_u = load(w.d_delta_u + row);
    const vec d_raw = (load(w.d_delta + row) * LN2 + d_delta_u * u) * load(w.slope + row);  // weights hold A / ln 2
    store(g.delta[t], d_raw);
    store(g.u[t], d_delta_u * load(w.delta + row) + D * dy);
    dD += dy * u;
    dbias += d_raw;
  }
  store(D_at, dD);
  store(bias_at, dbias);
}

// One chunk's gradients. The later chunks are done and have written `carry`.
static void scan_backward(const Scan& s, const Gradients& g, const Scratch& w, Span steps) {
  const auto [begin, end] = steps;
  prepare_steps(s, g, w, begin, end);
  int first = 0;
  for (; first + 4 <= s.states; first += 4) backward_states<4>(s, g, w, first, begin, end);
  switch (s.states - first) {
    case 1: backward_states<1>(s, g, w, first, begin, end); break;
    case 2: backward_states<2>(s, g, w, first, begin, end); break;
    case 3: backward_states<3>(s, g, w, first, begin, end);
  }
  store_gradients(s, g, w, begin, end);
}

// Finish what `fold` began: sum one step's vectors, `stride` floats apart, over the lanes, for each state.
static void sum_lanes(const float* from, int64_t stride, float* to, int64_t states) {
  typedef float four __attribute__((vector_size(16), aligned(4)));
  for (int64_t first = 0; first < states; first += 4, from += stride) {
    four sum = {};
    for (int lane = 0; lane < LANES; lane += 4) sum += *reinterpret_cast<const four*>(from + lane);
    if (first + 4 <= states) *reinterpret_cast<four*>(to + first) = sum;
    for (int64_t n = first; first + 4 > states && n < states; n++) to[n] = sum[n - first];
  }
}

// The convolution at steps from `begin` on, before SiLU.
template <int FIXED>
INLINE void sums_of_taps(const Conv& c, int64_t begin, int64_t end, float* sums) {
  const int K = FIXED ? FIXED : c.taps;
  const vec bias = load(c.weights + K * LANES);
  vec past[FIXED ? FIXED : MOST_TAPS];
  for (int k = 1; k < K; k++) past[k] = begin + k < K ? vec{} : load(c.x[begin + k - K]);
  for (int64_t t = begin; t < end; t++) {
    vec sum = bias;
    for (int k = 0; k + 1 < K; k++) past[k] = past[k + 1];
    past[K - 1] = load(c.x[t]);
    prefetch(c.x, t, c.next);
    for (int k = 0; k < K; k++) sum += past[k] * load(c.weights + k * LANES);
    store(sums + (t - begin) * LANES, sum);
  }
}

template <int FIXED>
static void conv_forward(const Conv& c, Rows y, Span steps) {
  float sums[CHUNK * LANES];
  sums_of_taps<FIXED>(c, steps.begin, steps.end, sums);
  map(steps.begin, steps.end, [&](int64_t t) { return load(sums + (t - steps.begin) * LANES); }, silu,
      [&](int64_t t, vec out) { prefetch(y, t, c.next), store(y[t], out); });
}

// dx of a step also needs the gradients of the K - 1 steps after it.
template <int FIXED>
static void conv_backward(const Conv& c, Rows dy, Rows dx, float* dweights, Span steps, bool add) {
  const int K = FIXED ? FIXED : c.taps;
  const int64_t begin = steps.begin, last = steps.end + K - 1, end = last < c.length ? last : c.length;
  float gradients[(CHUNK + MOST_TAPS) * LANES];
  const auto gradient = [&](int64_t t) { return gradients + (t - begin) * LANES; };
  sums_of_taps<FIXED>(c, begin, end, gradients);
  map(begin, end, [&](int64_t t) { return load(gradient(t)); }, silu_slope,
      [&](int64_t t, vec slope) { prefetch(dy, t, c.next), store(gradient(t), load(dy[t]) * slope); });
  for (int64_t t = end; t < last; t++) store(gradient(t), vec{});
  vec dw[(FIXED ? FIXED : MOST_TAPS) + 1];
  for (int k = 0; k <= K; k++) dw[k] = load(dweights + k * LANES);
  for (int64_t t = begin; t < steps.end; t++) {
    const vec here = load(gradient(t));
    vec d = {};
    prefetch(dx, t, c.next);
    for (int k = 0; k < K; k++) {
      if (t + k >= K - 1) dw[k] += here * load(c.x[t + k - K + 1]);
      d += load(gradient(t + K - 1 - k)) * load(c.weights + k * LANES);
    }
    dw[K] += here;
    store(dx[t], add ? load(dx[t]) + d : d);
  }
  for (int k = 0; k <= K; k++) store(dweights + k * LANES, dw[k]);
}

static void forward(const Scan& s, Rows y, float* h, Span steps, bool add) {
  s.states == 16 ? scan_forward<16>(s, y, h, steps, add) : scan_forward<0>(s, y, h, steps, add);
}

static void convolve(const Conv& c, Rows y, Span steps) {
  c.taps == 4 ? conv_forward<4>(c, y, steps) : conv_forward<0>(c, y, steps);
}

static void convolve_backward(const Conv& c, Rows dy, Rows dx, float* dweights, Span steps, bool add) {
  c.taps == 4 ? conv_backward<4>(c, dy, dx, dweights, steps, add) : conv_backward<0>(c, dy, dx, dweights, steps, add);
}

static const Kernels kernels = {NAME, LANES, forward, scan_backward, sum_lanes, convolve, convolve_backward};

#undef INLINE
