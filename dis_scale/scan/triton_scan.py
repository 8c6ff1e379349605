"""The Triton backend's scan: the kernels scan_forward and scan_backward, which triton.py launches.

A thread computes one channel with all its states, and reads back only what it wrote itself. Threads exchange data only for
the gradients of B and C. Values in tuples are in registers, one per step or per state. All sums and states are float32.
Distances between rows are constants, so that a step is an immediate offset; within a batch row they fit 32 bits.

Names end in their axes: e channels, n states, t time. Channels are a tile (lanes, warps) with the lanes first, or
`_load_four` would not be one load. triton.py's `_by_state` describes the layout of B and C.

Sizes and flags, all compile-time constants:

    E, L, N         channels, time, states
    u_row, ...      distance between two rows of that tensor, in elements
    LANES, WARPS    channels of a warp (one per thread), warps of a program
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
    OUTPUT          y is needed
    STATE_ROWS      rows of (E) per chunk in the buffer of the states: CHUNK if they are stored in rows of gradients that are
                    not yet written, N in a buffer of their own

Pointers, (batch, time, channels) unless given otherwise. A kernel takes them in tuples: `inputs` is u, delta, A, BC, D, bias;
`gradients` is du, ddelta; `y_halves` and `h_halves` are the (high, low) pairs.

    u, delta        the inputs; delta is raw, without bias and softplus
    A               (E, N)
    BC              B and C, (batch, 2, N, LENGTH), float32; LENGTH is L rounded up to whole chunks, and the padding is zeros
                    after the sequence, or before it if REVERSE
    D, bias         (E)
    z, dy           the gate, and the gradient of the gated output
    out             y, or the gradient of z
    y_high, y_low   y between the two directions; float32 numbers, or their upper and lower 16 bits
    h_high, h_low   the states after each chunk, in the same way
    kept_y          y before the gate, as `out`
    dz              the gradient of z
    du, ddelta      gradients
    warp_sums       a program's sums over channels for dB and dC, (N, WARPS, LANES), float32
    dBC             gradients of B and C, one part per program, as BC
    parameters      per batch row (2 N + 2, E), float32: N rows for A's gradient, one for D's, one for the bias's, and N for
                    the gradients that the states pass from chunk to chunk

A backward pass computes a chunk's states again (`_recompute_states`), then goes through its steps in reverse order and
accumulates gradients (`_backpropagate_states`), as chunked.py and kernels.inl do.
"""

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + t). The logarithm is t times a polynomial, the same as `log1p` in kernels.inl, which gives its source."""
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
def _row_of_step(i, L: tl.constexpr, REVERSE: tl.constexpr):
    """Row of step i of a direction in its batch row."""
    return L - 1 - i if REVERSE else i


@triton.jit
def _channels(LANES: tl.constexpr, WARPS: tl.constexpr):
    """The program's tile of channels."""
    return (tl.program_id(0) * WARPS + tl.arange(0, WARPS)[None, :]) * LANES + tl.arange(0, LANES)[:, None]


@triton.jit
def _address(x, x_row, first, j, e, L: tl.constexpr, REVERSE: tl.constexpr):
    """Addresses of step first + j. The order of the sum matters: the constant j becomes part of the instruction."""
    return x + (_row_of_step(first, L, REVERSE) * x_row + e) + (-j * x_row if REVERSE else j * x_row)


@triton.jit
def _load(x, x_row, first, j, e, inside, L: tl.constexpr, REVERSE: tl.constexpr):
    """Load step first + j in float32; zeros past the end."""
    valid = inside & (first + j < L)
    return tl.load(_address(x, x_row, first, j, e, L, REVERSE), mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _store(x, x_row, first, j, e, value_e, inside, L: tl.constexpr, REVERSE: tl.constexpr):
    valid = inside & (first + j < L)
    tl.store(_address(x, x_row, first, j, e, L, REVERSE), value_e.to(x.dtype.element_ty), mask=valid)


@triton.jit
def _load_four(x, e, REVERSE: tl.constexpr):
    """Load four neighbouring numbers by one instruction, each as a tile; in reverse order if the direction is reversed."""
    at = tl.broadcast_to(tl.arange(0, 4)[:, None, None], [4, e.shape[0], e.shape[1]])
    x = tl.reshape(tl.load(x + at), [2, 2, e.shape[0], e.shape[1]])
    even, odd = tl.split(tl.permute(x, (2, 3, 0, 1)))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    if REVERSE:
        return three, two, one, zero
    else:
        return zero, one, two, three


@triton.jit
def _load_steps(x, first, e, STEPS: tl.constexpr, LENGTH: tl.constexpr, REVERSE: tl.constexpr):
    """Load a state's B or C at STEPS steps, a multiple of four."""
    x_t = ()
    for j in tl.static_range(0, STEPS, 4):
        x_t += _load_four(x + (LENGTH - 4 - j - first if REVERSE else first + j), e, REVERSE)
    return x_t


@triton.jit
def _step_sizes(raws, bias_e, first, inside, L: tl.constexpr):
    """Compute delta from its raw values; zeros past the end."""
    deltas = ()
    for j in tl.static_range(len(raws)):
        deltas += (tl.where(inside & (first + j < L), _softplus(raws[j] + bias_e), 0.0),)
    return deltas


@triton.jit
def _load_scaled(A, n, e, inside, N: tl.constexpr):
    """Load one state's A / ln 2, for decays as powers of 2."""
    return tl.load(A + e * N + n, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def _initial_states(A, e, inside, N: tl.constexpr):
    """States of zero, and their A / ln 2."""
    h, A_n = (), ()
    for n in tl.static_range(N):
        h += (tl.zeros(e.shape, tl.float32),)
        A_n += (_load_scaled(A, n, e, inside, N),)
    return h, A_n


@triton.jit
def _advance(
    h, A_n, BC, D_e, deltas, us, first, e, LENGTH: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """Advance all states by some steps; compute y if OUTPUT is set."""
    STEPS: tl.constexpr = len(deltas)
    states, ys, delta_us = (), (), ()
    for j in tl.static_range(STEPS):
        ys += (D_e * us[j],)
        delta_us += (deltas[j] * us[j],)
    for n in tl.static_range(len(h)):
        h_e, sums = h[n], ()
        B_t = _load_steps(BC + n * LENGTH, first, e, STEPS, LENGTH, REVERSE)
        if OUTPUT:
            C_t = _load_steps(BC + (len(h) + n) * LENGTH, first, e, STEPS, LENGTH, REVERSE)
        for j in tl.static_range(STEPS):
            h_e = tl.exp2(deltas[j] * A_n[n]) * h_e + delta_us[j] * B_t[j]
            if OUTPUT:
                sums += (ys[j] + h_e * C_t[j],)
        states += (h_e,)
        if OUTPUT:
            ys = sums
    return states, ys


@triton.jit
def _store_halves(high, low, x_e, inside):
    """Store float32 numbers in one float32 tensor, or their halves in two tensors of 16 bits."""
    if high.dtype.element_ty == tl.float32:
        tl.store(high, x_e, mask=inside)
    else:
        bits = x_e.to(tl.int32, bitcast=True)
        tl.store(high, (bits >> 16).to(tl.int16).to(high.dtype.element_ty, bitcast=True), mask=inside)
        tl.store(low, bits.to(tl.int16).to(low.dtype.element_ty, bitcast=True), mask=inside)


@triton.jit
def _load_halves(high, low, inside):
    if high.dtype.element_ty == tl.float32:
        return tl.load(high, mask=inside, other=0.0)
    else:
        bits = tl.load(high, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
        bits |= tl.load(low, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _state_buffer(high, low, batch, E: tl.constexpr, L: tl.constexpr, STATE_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The state buffers at this batch row; `_state_row` counts rows from here."""
    ROWS: tl.constexpr = L if STATE_ROWS == CHUNK else (L + CHUNK - 1) // CHUNK * STATE_ROWS
    return high + batch * ROWS * E, low + batch * ROWS * E


@triton.jit
def _state_row(chunk, n, L: tl.constexpr, STATE_ROWS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """Row of state n after a chunk: one of the chunk's gradient rows, written later, or one of a separate buffer."""
    ROWS: tl.constexpr = L if STATE_ROWS == CHUNK else (L + CHUNK - 1) // CHUNK * STATE_ROWS
    return _row_of_step(chunk * STATE_ROWS + n, ROWS, REVERSE)


@triton.jit
def _load_group(
    u, delta, z, dy, y_high, y_low, u_row, delta_row, z_row, dy_row, first, e, inside, E: tl.constexpr, L: tl.constexpr,
    REVERSE: tl.constexpr, SECOND: tl.constexpr, GATE: tl.constexpr, FOR_BACKWARD: tl.constexpr, STEPS: tl.constexpr = 4,
):  # fmt: skip
    """Load what a group of steps needs: raw delta, u, and for the output the first direction's y, z, and z's gradient's dy."""
    raws, us, ys, zs, dys = (), (), (), (), ()
    for j in tl.static_range(STEPS):
        raws += (_load(delta, delta_row, first, j, e, inside, L, REVERSE),)
        us += (_load(u, u_row, first, j, e, inside, L, REVERSE),)
        if SECOND:
            high, low = _address(y_high, E, first, j, e, L, REVERSE), _address(y_low, E, first, j, e, L, REVERSE)
            ys += (_load_halves(high, low, inside & (first + j < L)),)
        if GATE:
            zs += (_load(z, z_row, first, j, e, inside, L, REVERSE),)
            if FOR_BACKWARD:
                dys += (_load(dy, dy_row, first, j, e, inside, L, REVERSE),)
    return raws, us, ys, zs, dys


@triton.jit
def _store_output(
    ys, first_ys, zs, dys, out, y_high, y_low, kept_y, first, e, inside, E: tl.constexpr, L: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, GATE: tl.constexpr, FOR_BACKWARD: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Store y for the second direction; or add the first direction's y, gate it, and store y or z's gradient."""
    for j in tl.static_range(len(ys)):
        y_e = ys[j]
        if SECOND:
            y_e += first_ys[j]
        if GATE:
            if KEEP:
                _store(kept_y, E, first, j, e, y_e, inside, L, REVERSE)
            gate = sigmoid(zs[j])
            if FOR_BACKWARD:
                y_e *= dys[j] * gate * (1.0 + zs[j] * (1.0 - gate))
            else:
                y_e *= zs[j] * gate
        if FIRST:
            high, low = _address(y_high, E, first, j, e, L, REVERSE), _address(y_low, E, first, j, e, L, REVERSE)
            _store_halves(high, low, y_e, inside & (first + j < L))
        else:
            _store(out, E, first, j, e, y_e, inside, L, REVERSE)


@triton.jit
def scan_forward(
    inputs, z, dy, out, y_halves, h_halves, kept_y,
    u_row: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    GATED: tl.constexpr, FOR_BACKWARD: tl.constexpr, KEEP: tl.constexpr, STATE_ROWS: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scan one direction: y, or what the backward pass needs (FOR_BACKWARD)."""
    e, batch = _channels(LANES, WARPS), tl.program_id(1).to(tl.int64)
    inside, rows = e < E, batch * L  # the only 64-bit number: within a batch row, distances fit 32 bits
    CHUNKS: tl.constexpr = (L + CHUNK - 1) // CHUNK
    OUTPUT: tl.constexpr = GATED or not FOR_BACKWARD
    GATE: tl.constexpr = GATED and not FIRST
    u, delta, A, BC, D, bias = inputs
    u, delta, BC = u + rows * u_row, delta + rows * delta_row, BC + batch * (2 * N * CHUNKS * CHUNK)
    z, dy, out, kept_y = z + rows * z_row, dy + rows * dy_row, out + rows * E, kept_y + rows * E
    y_high, y_low = y_halves[0] + rows * E, y_halves[1] + rows * E
    h_high, h_low = _state_buffer(h_halves[0], h_halves[1], batch, E, L, STATE_ROWS, CHUNK)
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    bias_e = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    h, A_n = _initial_states(A, e, inside, N)
    for chunk in range(CHUNKS if OUTPUT else CHUNKS - 1):
        for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, L), 4):
            raws, us, first_ys, zs, dys = _load_group(
                u, delta, z, dy, y_high, y_low, u_row, delta_row, z_row, dy_row, first, e, inside, E, L,
                REVERSE, SECOND, GATE, FOR_BACKWARD,
            )  # fmt: skip
            deltas = _step_sizes(raws, bias_e, first, inside, L)
            h, ys = _advance(h, A_n, BC, D_e, deltas, us, first, e, CHUNKS * CHUNK, REVERSE, OUTPUT)
            if OUTPUT:
                _store_output(
                    ys, first_ys, zs, dys, out, y_high, y_low, kept_y, first, e, inside, E, L,
                    REVERSE, FIRST, SECOND, GATE, FOR_BACKWARD, KEEP,
                )  # fmt: skip
        if FOR_BACKWARD or KEEP:
            for n in tl.static_range(N):
                at = _state_row(chunk, n, L, STATE_ROWS, CHUNK, REVERSE) * E + e
                _store_halves(h_high + at, h_low + at, h[n], inside & (chunk < CHUNKS - 1))


@triton.jit
def _exchange(a_e, b_e, BIT: tl.constexpr):
    """One step of a sum over lanes, for two values at once: lanes without the bit continue with a, the others with b."""
    lane = tl.broadcast_to(tl.arange(0, a_e.shape[0])[:, None], a_e.shape)
    clear = (lane & BIT) == 0
    return tl.where(clear, a_e, b_e) + tl.gather(tl.where(clear, b_e, a_e), lane ^ BIT, axis=0)


@triton.jit
def _recompute_states(h_e, A_e, B_t, deltas, delta_us):
    """Compute one state's decays in a chunk again, and its values before each step and after the last one."""
    decays, states = (), (h_e,)
    for j in tl.static_range(len(deltas)):
        decays += (tl.exp2(deltas[j] * A_e),)
        states += (decays[j] * states[j] + delta_us[j] * B_t[j],)
    return decays, states


@triton.jit
def _backpropagate_states(
    carry_e, dA_e, A_e, B_t, C_t, deltas, delta_us, dys, decays, states, d_delta_us, d_deltas, REVERSE: tl.constexpr
):
    """Go through the same steps in reverse order. Returns the gradient for the chunk before, A's gradient, the sums of
    delta u and delta with this state's part added, and B's and C's gradients by row, summed over half of the lanes."""
    parts, sums_delta_u, sums_delta = (), (), ()
    for j in tl.static_range(len(deltas) - 1, -1, -1):
        dh_e = carry_e + dys[j] * C_t[j]
        part = (_exchange(dh_e * delta_us[j], dys[j] * states[j + 1], len(deltas)),)
        parts = parts + part if REVERSE else part + parts
        carry_e = dh_e * decays[j]
        d_exponent_e = carry_e * states[j]
        sums_delta_u = (d_delta_us[j] + dh_e * B_t[j],) + sums_delta_u
        sums_delta = (d_deltas[j] + d_exponent_e * A_e,) + sums_delta
        dA_e += d_exponent_e * deltas[j]
    return carry_e, dA_e, sums_delta_u, sums_delta, parts


@triton.jit
def _sum_over_lanes(parts):
    """Sum over the other half of the lanes: lane i gets row i of B's gradient, lane i + 16 row i of C's. Each shuffle halves
    the number of values, so that 32 sums take 31 shuffles; a single sum takes 5."""
    for stage in tl.static_range(4):
        halves = ()
        for i in tl.static_range(len(parts) // 2):
            halves += (_exchange(parts[2 * i], parts[2 * i + 1], 2**stage),)
        parts = halves
    return parts[0]


@triton.jit
def _load_state(
    A, h_high, h_low, dA, n, first, e, inside,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, STATE_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Load what one state needs in a chunk: A, its value, the gradient from the next chunk, the sum for A's gradient."""
    at, after = n * E + e, inside & (first + CHUNK < L)
    start = _state_row(first // CHUNK - 1, n, L, STATE_ROWS, CHUNK, REVERSE) * E + e
    return (
        _load_scaled(A, n, e, inside, N),
        _load_halves(h_high + start, h_low + start, inside & (first > 0)),
        tl.load(dA + at + (N + 2) * E, mask=after, other=0.0),
        tl.load(dA + at, mask=after, other=0.0),
    )


@triton.jit
def _thread_number(e):
    """Number of a thread in its program."""
    return tl.arange(0, e.shape[1])[None, :] * e.shape[0] + tl.arange(0, e.shape[0])[:, None]


@triton.jit
def _sum_warps(
    warp_sums, dBC, first, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum a chunk's gradients of B and C over the warps of the program."""
    LENGTH: tl.constexpr = (L + CHUNK - 1) // CHUNK * CHUNK
    n, lane = tl.arange(0, STATES)[:, None], tl.arange(0, LANES)[None, :]
    total = tl.zeros([STATES, LANES], tl.float32)
    for warp in tl.static_range(WARPS):
        total += tl.load(warp_sums + (n * WARPS + warp) * LANES + lane, mask=n < N, other=0.0)
    row = lane % CHUNK + (LENGTH - CHUNK - first if REVERSE else first)
    tl.store(dBC + (lane // CHUNK * N + n) * LENGTH + row, total, mask=n < N)


@triton.jit
def _store_gradients(
    u, delta, u_row, delta_row, bias_e, D_e, du, ddelta, deltas, dys, d_delta_us, d_deltas, first, e, inside,
    E: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of u and delta; return the chunk's parts of D's and the bias's."""
    dD_e, dbias_e = tl.zeros_like(D_e), tl.zeros_like(D_e)
    for j in tl.static_range(len(deltas)):
        raw_e = _load(delta, delta_row, first, j, e, inside, L, REVERSE) + bias_e
        u_e = _load(u, u_row, first, j, e, inside, L, REVERSE)
        d_delta_e = d_deltas[j] * 0.6931471805599453 + d_delta_us[j] * u_e  # A is A / ln 2
        slope_e = tl.exp2((raw_e - deltas[j]) * 1.4426950408889634)  # softplus' derivative, exp(x - softplus(x))
        d_raw_e = tl.where(inside & (first + j < L), d_delta_e * slope_e, 0.0)
        _store(ddelta, E, first, j, e, d_raw_e, inside, L, REVERSE)
        _store(du, E, first, j, e, d_delta_us[j] * deltas[j] + D_e * dys[j], inside, L, REVERSE)
        dD_e += dys[j] * u_e
        dbias_e += d_raw_e
    return dD_e, dbias_e


@triton.jit
def scan_backward(
    inputs, z, dy, h_halves, warp_sums, gradients, dBC, parameters, kept_y, dz,
    u_row: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr,
    GATE_GRADIENT: tl.constexpr, STATE_ROWS: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute one direction's gradients, from the last chunk to the first, after scan_forward has stored the states."""
    e, batch = _channels(LANES, WARPS), tl.program_id(1).to(tl.int64)
    inside, rows, program = e < E, batch * L, tl.program_id(0) * tl.num_programs(1) + batch
    CHUNKS: tl.constexpr = (L + CHUNK - 1) // CHUNK
    LENGTH: tl.constexpr = CHUNKS * CHUNK
    BOTH: tl.constexpr = 2 * N * LENGTH
    u, delta, A, BC, D, bias = inputs
    du, ddelta = gradients
    u, delta, BC = u + rows * u_row, delta + rows * delta_row, BC + batch * BOTH
    z, dy, du, ddelta = z + rows * z_row, dy + rows * dy_row, du + rows * E, ddelta + rows * E
    kept_y, dz = kept_y + rows * E, dz + rows * E
    h_high, h_low = _state_buffer(h_halves[0], h_halves[1], batch, E, L, STATE_ROWS, CHUNK)
    dA = parameters + batch * (2 * N + 2) * E
    warp_sums, dBC = warp_sums + program * N * WARPS * LANES, dBC + program * BOTH
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    bias_e = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    dD_e, dbias_e = tl.zeros_like(D_e), tl.zeros_like(D_e)
    for k in range(CHUNKS):
        first = (CHUNKS - 1 - k) * CHUNK
        raws, us, delta_us, dys, d_delta_us, d_deltas = (), (), (), (), (), ()
        for j in tl.static_range(CHUNK):
            raws += (_load(delta, delta_row, first, j, e, inside, L, REVERSE),)
            us += (_load(u, u_row, first, j, e, inside, L, REVERSE),)
        deltas = _step_sizes(raws, bias_e, first, inside, L)
        for j in tl.static_range(CHUNK):
            dy_e = _load(dy, dy_row, first, j, e, inside, L, REVERSE)
            if GATED:
                z_e = _load(z, z_row, first, j, e, inside, L, REVERSE)
                gate_e = sigmoid(z_e)
                if GATE_GRADIENT:
                    y_e = _load(kept_y, E, first, j, e, inside, L, REVERSE)
                    dz_e = y_e * (dy_e * gate_e * (1.0 + z_e * (1.0 - gate_e)))
                    _store(dz, E, first, j, e, dz_e, inside, L, REVERSE)
                dy_e *= z_e * gate_e
            delta_us, dys = delta_us + (deltas[j] * us[j],), dys + (dy_e,)
            d_delta_us, d_deltas = d_delta_us + (tl.zeros_like(D_e),), d_deltas + (tl.zeros_like(D_e),)
        prefetched = _load_state(A, h_high, h_low, dA, 0, first, e, inside, E, L, N, REVERSE, STATE_ROWS, CHUNK)
        for n in range(N):
            A_e, h_e, carry_e, dA_e = prefetched  # the next state's are loaded while this one is computed
            next_n = min(n + 1, N - 1)
            prefetched = _load_state(
                A, h_high, h_low, dA, next_n, first, e, inside, E, L, N, REVERSE, STATE_ROWS, CHUNK
            )
            B_t = _load_steps(BC + n * LENGTH, first, e, CHUNK, LENGTH, REVERSE)
            C_t = _load_steps(BC + (N + n) * LENGTH, first, e, CHUNK, LENGTH, REVERSE)
            decays, states = _recompute_states(h_e, A_e, B_t, deltas, delta_us)
            carry_e, dA_e, d_delta_us, d_deltas, parts = _backpropagate_states(
                carry_e, dA_e, A_e, B_t, C_t, deltas, delta_us, dys, decays, states, d_delta_us, d_deltas, REVERSE
            )
            tl.store(dA + (n * E + e) + (N + 2) * E, carry_e, mask=inside)
            tl.store(dA + (n * E + e), dA_e, mask=inside)
            tl.store(warp_sums + n * (LANES * WARPS) + _thread_number(e), _sum_over_lanes(parts))
        tl.debug_barrier()  # all warps have stored their sums
        _sum_warps(warp_sums, dBC, first, L, N, REVERSE, LANES, WARPS, STATES, CHUNK)
        tl.debug_barrier()  # the sums have been read
        chunk_dD_e, chunk_dbias_e = _store_gradients(
            u, delta, u_row, delta_row, bias_e, D_e, du, ddelta, deltas, dys, d_delta_us, d_deltas, first, e, inside,
            E, L, REVERSE,
        )  # fmt: skip
        dD_e += chunk_dD_e
        dbias_e += chunk_dbias_e
    tl.store(dA + N * E + e, dD_e, mask=inside)
    tl.store(dA + (N + 1) * E + e, dbias_e, mask=inside)
