"""The Triton backend's scan: the kernels scan_forward and scan_backward, which triton.py launches.

A thread is one channel with all its states, and what it reads back it wrote itself; nothing is exchanged but for the
gradients of B and C. A name's ending says its axes: e channels, n states, t time; a scan's channels are a tile, (lanes,
warps), with the lanes first, or `_four` would not be one load. Distances are constants, so that a step is an immediate
offset, and within a batch row fit 32 bits. What stands in tuples stands in registers, step by step or state by state; all
sums and states are float32. B and C come as triton.py's `_by_state` gives them.
"""

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + t), the logarithm as t times a minimax polynomial on [0, 1], 3.0e-8 relative."""
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
def _row(i, L: tl.constexpr, REVERSE: tl.constexpr):
    """Where step i of a direction lies in its batch row."""
    return L - 1 - i if REVERSE else i


@triton.jit
def _channels(LANES: tl.constexpr, WARPS: tl.constexpr):
    """The program's tile of channels."""
    return (tl.program_id(0) * WARPS + tl.arange(0, WARPS)[None, :]) * LANES + tl.arange(0, LANES)[:, None]


@triton.jit
def _at(x, x_row, first, j, e, L: tl.constexpr, REVERSE: tl.constexpr):
    """Step first + j of the channels. The sum's order matters: j, a constant, becomes a part of the instruction."""
    return x + (_row(first, L, REVERSE) * x_row + e) + (-j * x_row if REVERSE else j * x_row)


@triton.jit
def _load(x, x_row, first, j, e, inside, L: tl.constexpr, REVERSE: tl.constexpr):
    """In float32, zeros past the end."""
    there = inside & (first + j < L)
    return tl.load(_at(x, x_row, first, j, e, L, REVERSE), mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store(x, x_row, first, j, e, value_e, inside, L: tl.constexpr, REVERSE: tl.constexpr):
    there = inside & (first + j < L)
    tl.store(_at(x, x_row, first, j, e, L, REVERSE), value_e.to(x.dtype.element_ty), mask=there)


@triton.jit
def _four(x, e, REVERSE: tl.constexpr):
    """Four neighbouring numbers by one load, each as a tile; the last one first where the direction is reversed."""
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
def _of_steps(x, first, e, STEPS: tl.constexpr, LENGTH: tl.constexpr, REVERSE: tl.constexpr):
    """A state's B or C at so many steps, a multiple of four."""
    x_t = ()
    for j in tl.static_range(0, STEPS, 4):
        x_t += _four(x + (LENGTH - 4 - j - first if REVERSE else first + j), e, REVERSE)
    return x_t


@triton.jit
def _take(
    u, delta, u_row, delta_row, bias_e, first, e, inside,
    L: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """delta and u, step by step; past the end, steps of length zero."""
    deltas, us = (), ()
    for j in tl.static_range(STEPS):
        raw_e = _load(delta, delta_row, first, j, e, inside, L, REVERSE) + bias_e
        deltas += (tl.where(inside & (first + j < L), _softplus(raw_e), 0.0),)
        us += (_load(u, u_row, first, j, e, inside, L, REVERSE),)
    return deltas, us


@triton.jit
def _states(A, e, inside, E: tl.constexpr, N: tl.constexpr):
    """Each state at rest, and its A / ln 2."""
    h, A_n = (), ()
    for n in tl.static_range(N):
        h += (tl.zeros(e.shape, tl.float32),)
        A_n += (tl.load(A + n * E + e, mask=inside, other=0.0),)
    return h, A_n


@triton.jit
def _advance(
    h, A_n, BC, D_e, deltas, us, first, e, LENGTH: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """All states, some steps on; and where they are wanted the y's."""
    STEPS: tl.constexpr = len(deltas)
    states, ys, delta_us = (), (), ()
    for j in tl.static_range(STEPS):
        ys += (D_e * us[j],)
        delta_us += (deltas[j] * us[j],)
    for n in tl.static_range(len(h)):
        h_e, sums = h[n], ()
        B_t = _of_steps(BC + n * LENGTH, first, e, STEPS, LENGTH, REVERSE)
        if OUTPUT:
            C_t = _of_steps(BC + (len(h) + n) * LENGTH, first, e, STEPS, LENGTH, REVERSE)
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
    """Float32 numbers into two tensors of 16 bits, or into one that is as wide."""
    if high.dtype.element_ty == tl.float32:
        tl.store(high, x_e, mask=inside)
    else:
        bits = x_e.to(tl.int32, bitcast=True)
        tl.store(high, (bits >> 16).to(tl.int16), mask=inside)
        tl.store(low, bits.to(tl.int16), mask=inside)


@triton.jit
def _load_halves(high, low, inside):
    if high.dtype.element_ty == tl.float32:
        return tl.load(high, mask=inside, other=0.0)
    else:
        bits = tl.load(high, mask=inside, other=0).to(tl.int32) << 16
        bits |= tl.load(low, mask=inside, other=0).to(tl.int32) & 0xFFFF
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _starts(high, low, batch, E: tl.constexpr, L: tl.constexpr, ROOM: tl.constexpr, CHUNK: tl.constexpr):
    """The batch row in which `_start` counts rows."""
    ROWS: tl.constexpr = L if ROOM == CHUNK else (L + CHUNK - 1) // CHUNK * ROOM
    return high + batch * ROWS * E, low + batch * ROWS * E


@triton.jit
def _start(chunk, n, L: tl.constexpr, ROOM: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """The row of a state after a chunk: one of the chunk's own, which its gradients fill later, or one set apart."""
    ROWS: tl.constexpr = L if ROOM == CHUNK else (L + CHUNK - 1) // CHUNK * ROOM
    return _row(chunk * ROOM + n, ROWS, REVERSE)


@triton.jit
def _deliver(
    ys, z, dy, out, y_high, y_low, z_row, dy_row, first, e, inside, E: tl.constexpr, L: tl.constexpr,
    REVERSE: tl.constexpr, LEAVE: tl.constexpr, JOIN: tl.constexpr, GATED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Leaves y for the other direction, or joins what that one left; then the gate, and y into `out` or z's gradient."""
    for j in tl.static_range(len(ys)):
        y_e, there = ys[j], inside & (first + j < L)
        high, low = _at(y_high, E, first, j, e, L, REVERSE), _at(y_low, E, first, j, e, L, REVERSE)
        if LEAVE:
            _store_halves(high, low, y_e, there)
        else:
            if JOIN:
                y_e += _load_halves(high, low, there)
            if GATED:
                z_e = _load(z, z_row, first, j, e, inside, L, REVERSE)
                gate = sigmoid(z_e)
                if AGAIN:
                    dy_e = _load(dy, dy_row, first, j, e, inside, L, REVERSE)
                    y_e *= dy_e * gate * (1.0 + z_e * (1.0 - gate))
                else:
                    y_e *= z_e * gate
            _store(out, E, first, j, e, y_e, inside, L, REVERSE)


@triton.jit
def scan_forward(
    u, delta, A, BC, D, bias, z, dy, out, y_high, y_low, high, low,
    u_row: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, LEAVE: tl.constexpr, JOIN: tl.constexpr,
    GATED: tl.constexpr, AGAIN: tl.constexpr, ROOM: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One direction: LEAVE its y for the other one, or JOIN that to its own. AGAIN is for the backward pass: the states
    after each chunk are left for it, and where there is a gate, `out` is the gradient of z."""
    e, batch = _channels(LANES, WARPS), tl.program_id(1).to(tl.int64)
    inside, rows = e < E, batch * L  # the only wide number: within a batch row, distances fit 32 bits
    CHUNKS: tl.constexpr = (L + CHUNK - 1) // CHUNK
    OUTPUT: tl.constexpr = GATED or not AGAIN
    u, delta, BC = u + rows * u_row, delta + rows * delta_row, BC + batch * (2 * N * CHUNKS * CHUNK)
    z, dy, out = z + rows * z_row, dy + rows * dy_row, out + rows * E
    y_high, y_low = y_high + rows * E, y_low + rows * E
    high, low = _starts(high, low, batch, E, L, ROOM, CHUNK)
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    bias_e = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    h, A_n = _states(A, e, inside, E, N)
    for chunk in range(CHUNKS if OUTPUT else CHUNKS - 1):
        for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, L), 4):
            deltas, us = _take(u, delta, u_row, delta_row, bias_e, first, e, inside, L, REVERSE, 4)
            h, ys = _advance(h, A_n, BC, D_e, deltas, us, first, e, CHUNKS * CHUNK, REVERSE, OUTPUT)
            if OUTPUT:
                _deliver(
                    ys, z, dy, out, y_high, y_low, z_row, dy_row, first, e, inside, E, L,
                    REVERSE, LEAVE, JOIN, GATED, AGAIN,
                )  # fmt: skip
        if AGAIN:
            for n in tl.static_range(N):
                at = _start(chunk, n, L, ROOM, CHUNK, REVERSE) * E + e
                _store_halves(high + at, low + at, h[n], inside & (chunk < CHUNKS - 1))


@triton.jit
def _exchange(a_e, b_e, BIT: tl.constexpr):
    """A step of a sum over lanes, for two values at once: lanes without the bit go on with a, those with it with b."""
    lane = tl.broadcast_to(tl.arange(0, a_e.shape[0])[:, None], a_e.shape)
    clear = (lane & BIT) == 0
    return tl.where(clear, a_e, b_e) + tl.gather(tl.where(clear, b_e, a_e), lane ^ BIT, axis=0)


@triton.jit
def _replay(h_e, A_e, B_t, deltas, delta_us):
    """One state through a chunk once more: its decays, and what it was before each step and after the last."""
    decays, states = (), (h_e,)
    for j in tl.static_range(len(deltas)):
        decays += (tl.exp2(deltas[j] * A_e),)
        states += (decays[j] * states[j] + delta_us[j] * B_t[j],)
    return decays, states


@triton.jit
def _retreat(
    carry_e, dA_e, A_e, B_t, C_t, deltas, delta_us, dys, decays, states, d_delta_us, d_deltas, REVERSE: tl.constexpr
):
    """The same state's way back: what it sends on, its part of A's gradient, the sums with its part added, and row by row
    B's and C's gradients, summed over half of the lanes."""
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
    """Sums over the other half: lane i gets row i's of B, and lane i + 16 row i's of C. A shuffle halves the values, so
    that 32 sums take 31 of them, where a sum alone takes 5."""
    for stage in tl.static_range(4):
        halves = ()
        for i in tl.static_range(len(parts) // 2):
            halves += (_exchange(parts[2 * i], parts[2 * i + 1], 2**stage),)
        parts = halves
    return parts[0]


@triton.jit
def _waiting(
    A, high, low, dA, n, first, e, inside,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, ROOM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What a state brings to a chunk: A, itself, what the chunk after sent back, and the sum for A's gradient."""
    at, after = n * E + e, inside & (first + CHUNK < L)
    start = _start(first // CHUNK - 1, n, L, ROOM, CHUNK, REVERSE) * E + e
    return (
        tl.load(A + at, mask=inside, other=0.0),
        _load_halves(high + start, low + start, inside & (first > 0)),
        tl.load(dA + at + (N + 2) * E, mask=after, other=0.0),
        tl.load(dA + at, mask=after, other=0.0),
    )


@triton.jit
def _local(e):
    """A thread's number in its program."""
    return tl.arange(0, e.shape[1])[None, :] * e.shape[0] + tl.arange(0, e.shape[0])[:, None]


@triton.jit
def _add_warps(
    warp_sums, dBC, first, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What all warps of the program have of a chunk's gradients of B and C."""
    LENGTH: tl.constexpr = (L + CHUNK - 1) // CHUNK * CHUNK
    n, lane = tl.arange(0, STATES)[:, None], tl.arange(0, LANES)[None, :]
    total = tl.zeros([STATES, LANES], tl.float32)
    for warp in tl.static_range(WARPS):
        total += tl.load(warp_sums + (n * WARPS + warp) * LANES + lane, mask=n < N, other=0.0)
    row = lane % CHUNK + (LENGTH - CHUNK - first if REVERSE else first)
    tl.store(dBC + (lane // CHUNK * N + n) * LENGTH + row, total, mask=n < N)


@triton.jit
def _gradients(
    u, delta, u_row, delta_row, bias_e, D_e, du, ddelta, deltas, dys, d_delta_us, d_deltas, first, e, inside,
    E: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of u and delta; gives the chunk's parts of D's and the bias's."""
    dD_e, dbias_e = tl.zeros_like(D_e), tl.zeros_like(D_e)
    for j in tl.static_range(len(deltas)):
        raw_e = _load(delta, delta_row, first, j, e, inside, L, REVERSE) + bias_e
        u_e = _load(u, u_row, first, j, e, inside, L, REVERSE)
        d_delta_e = d_deltas[j] * 0.6931471805599453 + d_delta_us[j] * u_e  # A came divided by ln 2
        slope_e = tl.exp2((raw_e - deltas[j]) * 1.4426950408889634)  # softplus' derivative, exp(x - softplus(x))
        d_raw_e = tl.where(inside & (first + j < L), d_delta_e * slope_e, 0.0)
        _store(ddelta, E, first, j, e, d_raw_e, inside, L, REVERSE)
        _store(du, E, first, j, e, d_delta_us[j] * deltas[j] + D_e * dys[j], inside, L, REVERSE)
        dD_e += dys[j] * u_e
        dbias_e += d_raw_e
    return dD_e, dbias_e


@triton.jit
def scan_backward(
    u, delta, A, BC, D, bias, z, dy, high, low, warp_sums, du, ddelta, dBC, parameters,
    u_row: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr, ROOM: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One direction's gradients, chunk by chunk from the last one, after scan_forward has left the states. `parameters` has
    N rows for A's, one for D's, one for the bias's, and N for what the states send from chunk to chunk."""
    e, batch = _channels(LANES, WARPS), tl.program_id(1).to(tl.int64)
    inside, rows, program = e < E, batch * L, tl.program_id(0) * tl.num_programs(1) + batch
    CHUNKS: tl.constexpr = (L + CHUNK - 1) // CHUNK
    LENGTH: tl.constexpr = CHUNKS * CHUNK
    BOTH: tl.constexpr = 2 * N * LENGTH
    u, delta, BC = u + rows * u_row, delta + rows * delta_row, BC + batch * BOTH
    z, dy, du, ddelta = z + rows * z_row, dy + rows * dy_row, du + rows * E, ddelta + rows * E
    high, low = _starts(high, low, batch, E, L, ROOM, CHUNK)
    dA = parameters + batch * (2 * N + 2) * E
    warp_sums, dBC = warp_sums + program * N * WARPS * LANES, dBC + program * BOTH
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    bias_e = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    dD_e, dbias_e = tl.zeros_like(D_e), tl.zeros_like(D_e)
    for k in range(CHUNKS):
        first = (CHUNKS - 1 - k) * CHUNK
        deltas, us = _take(u, delta, u_row, delta_row, bias_e, first, e, inside, L, REVERSE, CHUNK)
        delta_us, dys, d_delta_us, d_deltas = (), (), (), ()
        for j in tl.static_range(CHUNK):
            dy_e = _load(dy, dy_row, first, j, e, inside, L, REVERSE)
            if GATED:
                z_e = _load(z, z_row, first, j, e, inside, L, REVERSE)
                dy_e *= z_e * sigmoid(z_e)
            delta_us, dys = delta_us + (deltas[j] * us[j],), dys + (dy_e,)
            d_delta_us, d_deltas = d_delta_us + (tl.zeros_like(D_e),), d_deltas + (tl.zeros_like(D_e),)
        coming = _waiting(A, high, low, dA, 0, first, e, inside, E, L, N, REVERSE, ROOM, CHUNK)
        for n in range(N):
            A_e, h_e, carry_e, dA_e = coming  # the next state's are on their way while this one computes
            next_n = min(n + 1, N - 1)
            coming = _waiting(A, high, low, dA, next_n, first, e, inside, E, L, N, REVERSE, ROOM, CHUNK)
            B_t = _of_steps(BC + n * LENGTH, first, e, CHUNK, LENGTH, REVERSE)
            C_t = _of_steps(BC + (N + n) * LENGTH, first, e, CHUNK, LENGTH, REVERSE)
            decays, states = _replay(h_e, A_e, B_t, deltas, delta_us)
            carry_e, dA_e, d_delta_us, d_deltas, parts = _retreat(
                carry_e, dA_e, A_e, B_t, C_t, deltas, delta_us, dys, decays, states, d_delta_us, d_deltas, REVERSE
            )
            tl.store(dA + (n * E + e) + (N + 2) * E, carry_e, mask=inside)
            tl.store(dA + (n * E + e), dA_e, mask=inside)
            tl.store(warp_sums + n * (LANES * WARPS) + _local(e), _sum_over_lanes(parts))
        tl.debug_barrier()  # the other warps' sums are there
        _add_warps(warp_sums, dBC, first, L, N, REVERSE, LANES, WARPS, STATES, CHUNK)
        tl.debug_barrier()  # they have been read
        more_D_e, more_bias_e = _gradients(
            u, delta, u_row, delta_row, bias_e, D_e, du, ddelta, deltas, dys, d_delta_us, d_deltas, first, e, inside,
            E, L, REVERSE,
        )  # fmt: skip
        dD_e += more_D_e
        dbias_e += more_bias_e
    tl.store(dA + N * E + e, dD_e, mask=inside)
    tl.store(dA + (N + 1) * E + e, dbias_e, mask=inside)
