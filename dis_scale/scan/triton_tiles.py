"""The Triton backend's scan: tiles of channels, and the parts of the kernels scan_forward and scan_backward.

A thread computes a channel with all its states. If SPLIT is larger than 1, SPLIT lanes of a warp share a channel. Then lane k has
the states k, k + SPLIT, ... . The steps k, k + SPLIT, ... are its own steps: there it computes what a channel needs once per step.
`spread` gives the values of own steps to the channel's other lanes; `collect` sums values over the channel's lanes. A thread reads
back only what it wrote itself.

Values in tuples are in registers, one per step or per state. All sums and states are float32. Distances between rows are
constants, so a step is an immediate offset of an instruction. Within a batch row, offsets fit 32 bits.

Names end in their axes: e channels, n states, t time. Channels are a tile (lanes, warps). The lanes come first, because
`_load_four` would otherwise not be one load. triton.py's `_by_state` describes the layout of B and C.

Sizes and flags, all compile-time constants:

    E, L, N         channels, time, states
    u_row, ...      distance between two rows of that tensor, in elements
    A_channel, ...  distance between two channels of A and of its gradient, and between two states
    LANES, WARPS    lanes of a warp, warps of a program
    SPLIT           lanes of a channel, which divide N
    CHUNK           steps between two stored states
    STATES          N rounded up to a power of 2
    REVERSE         the direction runs from the end of the sequence to its start
    FIRST           another direction follows: store y for it, in float32
    SECOND          add the y that the first direction stored
    GATED           there is a gate z
    FOR_BACKWARD    the forward pass is repeated for the backward pass: store the states after each chunk; with a gate,
                    `out` is the gradient of z
    KEEP            the forward pass stores these states itself, and y before the gate, so that it need not be repeated
    GATE_GRADIENT   the backward pass computes the gradient of z from this y
    PRODUCTS        sum B's and C's gradients over a warp's channels on tensor cores
    OUTPUT          y is needed
    STATE_ROWS      rows of (E) per chunk in the buffer of the states: CHUNK if they are stored in rows of gradients that are
                    not yet written, N in a buffer of their own

Pointers, (batch, time, channels) unless given otherwise. A kernel takes them in tuples: `inputs` is u, delta, A, BC, D, bias;
`gradients` is du, ddelta; `y_halves` and `h_halves` are the (high, low) pairs. scan_backward takes a tuple with these of each
direction.

    u, delta        the inputs; delta is raw, without bias and softplus
    A               (E, N)
    BC              B and C, (batch, 2, LENGTH / 4, N, 4), float32; LENGTH is L rounded up to complete chunks, and the padding is
                    zeros after the sequence, or before it if REVERSE
    D, bias         (E)
    z, dy           the gate, and the gradient of the gated output
    out             y, or the gradient of z
    y_high, y_low   y between the two directions; float32 numbers, or their upper and lower 16 bits
    h_high, h_low   the states after each chunk, in the same way
    kept_y          y before the gate, as `out`
    dz              the gradient of z
    du, ddelta      gradients
    warp_sums       a program's sums over channels for dB and dC, (N, WARPS, LANES), float32: 16 steps of each
    dBC             gradients of B and C, one part per program, as BC
    parameters      per batch row (2 N + 2, E), float32: N rows for A's gradient, one for D's, one for the bias's, and N for
                    the gradients that the states pass from chunk to chunk
"""

import triton
import triton.language as tl

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
"""Flag of compiled kernels. The interpreter cannot run inline assembly."""
PIECE = tl.constexpr(32)
"""Bytes that a GPU's caches load at a time."""


@triton.jit
def _softplus(x):
    """Return max(x, 0) + log(1 + t), t = exp(-|x|). The logarithm is t times the polynomial of `log1p` in kernels.inl; see there
    for its source."""
    t = tl.exp2(tl.abs(x) * -1.4426950408889634)
    p = t * 0.005232630763202906 - 0.029504967853426933
    p = p * t + 0.07822547852993011
    p = p * t - 0.1366320252418518
    p = p * t + 0.19105982780456543
    p = p * t - 0.24842974543571472
    p = p * t + 0.3331909477710724
    p = p * t - 0.4999949336051941
    p = p * t + 0.9999999403953552
    return tl.maximum(x, 0.0) + p * t


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def lane_of(e):
    return tl.broadcast_to(tl.arange(0, e.shape[0])[:, None], e.shape)


@triton.jit
def channels_of(LANES: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr):
    """Return the program's tile of channels: neighbouring lanes have neighbouring channels."""
    WIDTH: tl.constexpr = LANES // SPLIT
    warp, lane = tl.program_id(0) * WARPS + tl.arange(0, WARPS)[None, :], tl.arange(0, LANES)[:, None]
    return warp * WIDTH + (lane if SPLIT == 1 else lane % WIDTH)


@triton.jit
def share_of(e, SPLIT: tl.constexpr):
    """Return each lane's number among the lanes of its channel."""
    return 0 if SPLIT == 1 else lane_of(e) // (e.shape[0] // SPLIT)


@triton.jit
def exchange(a_e, b_e, BIT: tl.constexpr):
    """Add a and b over pairs of lanes whose numbers differ in BIT. Lanes without the bit get the sum of a, the others that of b."""
    lane = lane_of(a_e)
    clear = (lane & BIT) == 0
    return tl.where(clear, a_e, b_e) + tl.gather(tl.where(clear, b_e, a_e), lane ^ BIT, axis=0)


@triton.jit
def spread(values, SPLIT: tl.constexpr):
    """Return the values of all steps from those of each lane's own steps, by one shuffle per step."""
    if SPLIT == 1:
        return values
    else:
        all_steps = ()
        WIDTH: tl.constexpr = values[0].shape[0] // SPLIT
        lane = lane_of(values[0]) % WIDTH
        for j in tl.static_range(len(values) * SPLIT):
            all_steps += (tl.gather(values[j // SPLIT], lane + j % SPLIT * WIDTH, axis=0),)
        return all_steps


@triton.jit
def sum_over_bits(values, FROM: tl.constexpr, TO: tl.constexpr):
    """Sum over the lanes whose numbers differ in the bits FROM, 2 FROM, ... below TO. Each stage halves the number of values, so
    32 sums over 32 lanes take 31 shuffles. Computed one by one, each sum would take 5."""
    for stage in tl.static_range(5):
        if FROM * 2**stage < TO:
            halves = ()
            for i in tl.static_range(len(values) // 2):
                halves += (exchange(values[2 * i], values[2 * i + 1], FROM * 2**stage),)
            values = halves
    return values


@triton.jit
def collect(values, SPLIT: tl.constexpr):
    """Sum the values of all steps over the lanes of a channel; each lane gets the sums of its own steps."""
    return sum_over_bits(values, values[0].shape[0] // SPLIT, values[0].shape[0])


@triton.jit
def sum_over_channel(x_e, SPLIT: tl.constexpr):
    """Sum over the lanes of a channel; all of them get the sum."""
    LANES: tl.constexpr = x_e.shape[0]
    for stage in tl.static_range(5):
        if 2**stage < SPLIT:
            x_e += tl.gather(x_e, lane_of(x_e) ^ (LANES // SPLIT * 2**stage), axis=0)
    return x_e


@triton.jit
def _row_of_step(i, L: tl.constexpr, REVERSE: tl.constexpr):
    """Return the row of a direction's step i within its batch row."""
    return L - 1 - i if REVERSE else i


@triton.jit
def address(x, x_row, first, j, e, L: tl.constexpr, REVERSE: tl.constexpr):
    """Return the addresses of step first + j. The constant j is added last, and so becomes part of the instruction."""
    return x + (_row_of_step(first, L, REVERSE) * x_row + e) + (-j * x_row if REVERSE else j * x_row)


@triton.jit
def load(x, x_row, first, j, e, inside, L: tl.constexpr, REVERSE: tl.constexpr):
    """Load step first + j in float32; zeros past the end."""
    valid = inside & (first + j < L)
    return tl.load(address(x, x_row, first, j, e, L, REVERSE), mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _touch(at):
    """Touch the PIECE bytes around each lane's valid address: load them into the cache. No thread waits for them before `settle`.

    The instruction loads only the first 2 of these bytes: after a tensor's last 16-bit number there may be no valid memory.
    """
    if COMPILED:
        aligned = at.to(tl.int64) & -PIECE
        return tl.inline_asm_elementwise("ld.global.u16 $0, [$1];", "=r,l", [aligned], dtype=tl.int32, is_pure=False, pack=1)
    else:
        return tl.zeros(at.shape, tl.int32)


@triton.jit
def settle(touched):
    """Use the touched values, or the assembler would remove their loads. One value in 2^16 makes its warp sleep for 1 ns."""
    if COMPILED:
        for i in tl.static_range(len(touched)):
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.eq.s32 p, $1, 32767; @p nanosleep.u32 1; mov.b32 $0, 0; }", "=r,r", [touched[i]],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def _touch_row(x, row, piece, e, E: tl.constexpr, SPLIT: tl.constexpr):
    """Touch a piece of a warp's channels in the row that begins `row` elements after `x`."""
    first = e - lane_of(e) % (e.shape[0] // SPLIT)
    return _touch(x + (row + tl.minimum(first + piece * (PIECE * 8 // x.dtype.element_ty.primitive_bitwidth), E - 1)))


@triton.jit
def touch_steps(
    x, x_row, first, e, E: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Touch a warp's channels at STEPS steps from `first`. Later loads then find them in the multiprocessor's cache."""
    PIECES: tl.constexpr = (e.shape[0] // SPLIT * x.dtype.element_ty.primitive_bitwidth // 8 + PIECE - 1) // PIECE
    touched = ()
    for j in tl.static_range(0, STEPS * PIECES, 32):
        i = lane_of(e) + j
        row = _row_of_step(tl.minimum(first + i % STEPS, L - 1), L, REVERSE) * x_row
        touched += (_touch_row(x, row, i // STEPS % PIECES, e, E, SPLIT),)
    return touched


@triton.jit
def touch_halves(
    high, low, x_row, first, e, E: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Touch the numbers that `load_halves` loads at STEPS steps from `first`."""
    touched = touch_steps(high, x_row, first, e, E, L, STEPS, SPLIT, REVERSE)
    if low.dtype.element_ty != tl.float32:
        touched += touch_steps(low, x_row, first, e, E, L, STEPS, SPLIT, REVERSE)
    return touched


@triton.jit
def touch_by_state(
    BC, first, e, LENGTH: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Touch B and C at STEPS steps from `first`."""
    FLOATS: tl.constexpr = PIECE // 4
    touched, BC = (), BC + (LENGTH - STEPS - first if REVERSE else first) * N
    for j in tl.static_range(0, (N * STEPS + FLOATS - 1) // FLOATS, 32):
        at = BC + tl.minimum((lane_of(e) + j) * FLOATS, N * STEPS - 1)
        touched += (_touch(at), _touch(at + N * LENGTH))
    return touched


@triton.jit
def store(x, x_row, first, j, e, value_e, inside, L: tl.constexpr, REVERSE: tl.constexpr):
    valid = inside & (first + j < L)
    tl.store(address(x, x_row, first, j, e, L, REVERSE), value_e.to(x.dtype.element_ty), mask=valid)


@triton.jit
def store_halves(high, low, x_e, inside):
    """Store float32 numbers in one float32 tensor, or their halves in two tensors of 16 bits."""
    if high.dtype.element_ty == tl.float32:
        tl.store(high, x_e, mask=inside)
    else:
        bits = x_e.to(tl.int32, bitcast=True)
        tl.store(high, (bits >> 16).to(tl.int16).to(high.dtype.element_ty, bitcast=True), mask=inside)
        tl.store(low, bits.to(tl.int16).to(low.dtype.element_ty, bitcast=True), mask=inside)


@triton.jit
def load_halves(high, low, inside):
    if high.dtype.element_ty == tl.float32:
        return tl.load(high, mask=inside, other=0.0)
    else:
        bits = tl.load(high, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
        bits |= tl.load(low, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load_four(x, e, SPLIT: tl.constexpr, REVERSE: tl.constexpr):
    """Load four neighbouring numbers by one instruction, and return each as a tile; in reverse order if REVERSE."""
    at = tl.broadcast_to(tl.arange(0, 4)[:, None, None], [4, e.shape[0], e.shape[1]])
    if SPLIT > 1:
        at += 4 * share_of(e, SPLIT)[None, :, :]
    x = tl.reshape(tl.load(x + at), [2, 2, e.shape[0], e.shape[1]])
    even, odd = tl.split(tl.permute(x, (2, 3, 0, 1)))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    if REVERSE:
        return three, two, one, zero
    else:
        return zero, one, two, three


@triton.jit
def load_steps(x, first, e, STEPS: tl.constexpr, LENGTH: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr):
    """Load a state's B or C at STEPS steps, a multiple of four."""
    x_t = ()
    for j in tl.static_range(0, STEPS, 4):
        x_t += _load_four(x + (LENGTH - 4 - j - first if REVERSE else first + j) * N, e, SPLIT, REVERSE)
    return x_t


@triton.jit
def step_sizes(raws, bias_e, own, inside, L: tl.constexpr, SPLIT: tl.constexpr):
    """Compute delta from its raw values; zeros past the end."""
    deltas = ()
    for j in tl.static_range(len(raws)):
        deltas += (tl.where(inside & (own + j * SPLIT < L), _softplus(raws[j] + bias_e), 0.0),)
    return deltas


@triton.jit
def load_scaled(A, n, e, inside, A_channel: tl.constexpr, A_state: tl.constexpr):
    """Load one state's A / ln 2, for decays as powers of 2."""
    return tl.load(A + e * A_channel + n * A_state, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.constexpr_function
def buffer_rows(L, STATE_ROWS, CHUNK):
    """Return the number of an image's rows in a buffer of states."""
    return L if STATE_ROWS == CHUNK else (L + CHUNK - 1) // CHUNK * STATE_ROWS


@triton.jit
def state_buffer(high, low, batch, E: tl.constexpr, L: tl.constexpr, STATE_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Return both pointers of the state buffer at this batch row; `state_row` counts rows from there."""
    ROWS: tl.constexpr = buffer_rows(L, STATE_ROWS, CHUNK)
    return high + batch * ROWS * E, low + batch * ROWS * E


@triton.jit
def state_row(chunk, n, L: tl.constexpr, STATE_ROWS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """Return the row of state n after a chunk: one of the chunk's gradient rows, written later, or one of a separate buffer."""
    return _row_of_step(chunk * STATE_ROWS + n, buffer_rows(L, STATE_ROWS, CHUNK), REVERSE)
