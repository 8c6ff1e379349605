"""The Triton backend's scan: the kernel scan_backward, which triton.py launches. Read first: triton_tiles.py.

For each chunk, the kernel computes the states again (`_recompute_states`). Then it goes through the chunk's steps in reverse order
and accumulates gradients (`_backpropagate_states`). chunked.py and kernels.inl do the same. Threads exchange data only for the
gradients of B and C, and between the lanes of a channel.
"""

import triton
import triton.language as tl

from dis_scale.scan.triton_tiles import (
    buffer_rows,
    channels_of,
    collect,
    exchange,
    lane_of,
    load,
    load_halves,
    load_scaled,
    load_steps,
    settle,
    share_of,
    sigmoid,
    spread,
    state_buffer,
    state_row,
    step_sizes,
    store,
    sum_over_bits,
    sum_over_channel,
    touch_by_state,
    touch_halves,
    touch_steps,
)


@triton.jit
def _recompute_states(h_e, A_e, B_t, deltas, delta_us):
    """Recompute one state's decays in a chunk, and its values before each step and after the last step."""
    decays, states = (), (h_e,)
    for j in tl.static_range(len(deltas)):
        decays += (tl.exp2(deltas[j] * A_e),)
        states += (decays[j] * states[j] + delta_us[j] * B_t[j],)
    return decays, states


@triton.jit
def _backpropagate_states(
    carry_e, dA_e, A_e, B_t, C_t, deltas, delta_us, dys, decays, states, d_delta_us, d_deltas,
    SPLIT: tl.constexpr, REVERSE: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Go through one state's steps in reverse order.

    Return the state's gradient for the chunk before, A's gradient, the sums for delta u and delta with this state's part added, and
    the gradients of B and C by row. These are summed over pairs of channels: half of the lanes have B's sums, the other half C's.
    If PRODUCTS, they are not yet summed, and B's and C's are separate values.
    """
    HALF: tl.constexpr = carry_e.shape[0] // SPLIT // 2
    parts, sums_delta_u, sums_delta = (), (), ()
    for j in tl.static_range(len(deltas) - 1, -1, -1):
        dh_e = carry_e + dys[j] * C_t[j]
        dB_e, dC_e = dh_e * delta_us[j], dys[j] * states[j + 1]
        part = (dB_e, dC_e) if PRODUCTS else (exchange(dB_e, dC_e, HALF),)
        parts = parts + part if REVERSE else part + parts
        carry_e = dh_e * decays[j]
        d_exponent_e = carry_e * states[j]
        sums_delta_u = (d_delta_us[j] + dh_e * B_t[j],) + sums_delta_u
        sums_delta = (d_deltas[j] + d_exponent_e * A_e,) + sums_delta
        dA_e += d_exponent_e * deltas[j]
    return carry_e, dA_e, sums_delta_u, sums_delta, parts


@triton.jit
def _sum_over_lanes(parts, SPLIT: tl.constexpr):
    """Sum over the channels that `_backpropagate_states` has not summed over: each lane gets SPLIT rows."""
    return sum_over_bits(parts, 1, parts[0].shape[0] // SPLIT // 2)


@triton.jit
def add_product(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """Return c + a b by tensor cores, for a warp's matrices a (16, 8), b (8, 8) and c (16, 8) in the layout of PTX's mma.m16n8k8.

    With g = lane // 4 and t = lane % 4 a lane has a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4]; b[t, g], b[t + 4, g];
    c[g, 2 t], c[g, 2 t + 1], c[g + 8, 2 t], c[g + 8, 2 t + 1]. a and b are truncated to 11 bits (tf32).
    """
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _sum_by_products(parts, SPLIT: tl.constexpr):
    """Sum over a warp's channels, first by products with matrices of zeros and ones, then by shuffles.

    Each product sums four values over four lanes, and puts the sums in their own columns. The shuffles sum over the groups of four
    lanes. Each lane gets SPLIT sums.
    """
    group = lane_of(parts[0]) // 4
    sums = ()
    for half in tl.static_range(2):
        c0, c1, c2, c3 = (tl.zeros_like(parts[0]),) * 4
        for i in tl.static_range(4):
            a0, a1, a2, a3 = parts[16 * half + 4 * i : 16 * half + 4 * i + 4]
            first, second = tl.where(group == i, 1.0, 0.0), tl.where(group == i + 4, 1.0, 0.0)
            c0, c1, c2, c3 = add_product(a0, a1, a2, a3, first, second, c0, c1, c2, c3)
        sums += (c0, c1, c2, c3)
    return sum_over_bits(sums, 4, group.shape[0] // SPLIT)


@triton.jit
def _store_products(warp_sums, n, sums, WARPS: tl.constexpr, SPLIT: tl.constexpr):
    """Store a state's sums over a warp's channels, from `_sum_by_products`, in the order of `_store_warp_sums`."""
    lane, warp = lane_of(sums[0]), tl.arange(0, WARPS)[None, :]
    LANES: tl.constexpr = lane.shape[0]
    GROUPS: tl.constexpr = LANES // SPLIT // 4
    for i in tl.static_range(SPLIT):
        number = i * GROUPS + lane // 4 % GROUPS  # parity of the column, B or C, half of the steps
        column = lane % 4 * 2 + number % 2
        row = number // 4 * 8 + column % 4 * 2 + column // 4
        tl.store(warp_sums + (n * WARPS + warp) * LANES + number // 2 % 2 * (LANES // 2) + row, sums[i])


@triton.jit
def _store_warp_sums(warp_sums, n, parts, e, WARPS: tl.constexpr, SPLIT: tl.constexpr):
    """Store a state's sums over a warp's channels: rows of B's gradient, then rows of C's."""
    LANES: tl.constexpr = e.shape[0]
    HALF: tl.constexpr = LANES // SPLIT // 2
    lane, warp = lane_of(e) % (LANES // SPLIT), tl.arange(0, e.shape[1])[None, :]
    at = (n * WARPS + warp) * LANES + lane // HALF * (LANES // 2) + lane % HALF
    for i in tl.static_range(SPLIT):
        tl.store(warp_sums + at + i * HALF, parts[i])


@triton.jit
def _store_parts(
    warp_sums, n, parts, e, WARPS: tl.constexpr, SPLIT: tl.constexpr, PRODUCTS: tl.constexpr
):  # fmt: skip
    """Sum a warp's parts of the gradients of B and C over its channels, by products or by shuffles, and store the sums."""
    if PRODUCTS:
        _store_products(warp_sums, n, _sum_by_products(parts, SPLIT), WARPS, SPLIT)
    else:
        _store_warp_sums(warp_sums, n, _sum_over_lanes(parts, SPLIT), e, WARPS, SPLIT)


@triton.jit
def _load_state(
    A, h_high, h_low, dA, n, first, e, inside, A_channel: tl.constexpr, A_state: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, STATE_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Load one state's data for a chunk: A / ln 2, the value before the chunk, the gradient from the next chunk, and the sum for
    A's gradient."""
    at, after = n * E + e, inside & (first + CHUNK < L)
    start = state_row(first // CHUNK - 1, n, L, STATE_ROWS, CHUNK, REVERSE) * E + e
    return (
        load_scaled(A, n, e, inside, A_channel, A_state),
        load_halves(h_high + start, h_low + start, inside & (first > 0)),
        tl.load(dA + at + (N + 2) * E, mask=after, other=0.0),
        tl.load(dA + at, mask=after, other=0.0),
    )


@triton.jit
def _sum_warps(
    warp_sums, dBC, first, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum a chunk's gradients of B and C over the warps of the program."""
    LENGTH: tl.constexpr = (L + CHUNK - 1) // CHUNK * CHUNK
    i = tl.arange(0, STATES * LANES)  # in the order of dBC: steps by four, states, the four steps
    four, n, step = i // (4 * STATES), i // 4 % STATES, i % 4
    total = tl.zeros(i.shape, tl.float32)
    for warp in tl.static_range(WARPS):
        total += tl.load(warp_sums + (n * WARPS + warp) * LANES + (four * 4 + step), mask=n < N, other=0.0)
    dBC += (LENGTH - CHUNK - first if REVERSE else first) * N
    tl.store(dBC + four // (CHUNK // 4) * (N * LENGTH) + (four % (CHUNK // 4) * N + n) * 4 + step, total, mask=n < N)


@triton.jit
def _store_gradients(
    u, delta, u_row, delta_row, bias_e, D_e, du, ddelta, deltas, dys, d_delta_us, d_deltas, own, e, inside,
    E: tl.constexpr, L: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of u and delta at a lane's own steps; return these steps' parts of the gradients of D and the bias."""
    dD_e, dbias_e = tl.zeros_like(D_e), tl.zeros_like(D_e)
    CHUNK: tl.constexpr = len(deltas) * SPLIT
    raws = _load_own(delta, delta_row, own, e, inside, L, CHUNK, SPLIT, REVERSE)
    us = _load_own(u, u_row, own, e, inside, L, CHUNK, SPLIT, REVERSE)
    for j in tl.static_range(len(deltas)):
        step, raw_e, u_e = j * SPLIT, raws[j] + bias_e, us[j]
        d_delta_e = d_deltas[j] * 0.6931471805599453 + d_delta_us[j] * u_e  # ln 2: the sums used A / ln 2
        slope_e = tl.exp2((raw_e - deltas[j]) * 1.4426950408889634)  # softplus' derivative, exp(x - softplus(x))
        d_raw_e = tl.where(inside & (own + step < L), d_delta_e * slope_e, 0.0)
        store(ddelta, E, own, step, e, d_raw_e, inside, L, REVERSE)
        store(du, E, own, step, e, d_delta_us[j] * deltas[j] + D_e * dys[j], inside, L, REVERSE)
        dD_e += dys[j] * u_e
        dbias_e += d_raw_e
    return dD_e, dbias_e


@triton.jit
def _store_vector_gradients(at, E: tl.constexpr, dD_e, dbias_e, share, inside, SPLIT: tl.constexpr):
    """Store the gradients of D, and after them those of the bias. One lane of each channel stores them."""
    once = inside if SPLIT == 1 else inside & (share == 0)
    tl.store(at, sum_over_channel(dD_e, SPLIT), mask=once)
    tl.store(at + E, sum_over_channel(dbias_e, SPLIT), mask=once)


@triton.jit
def _through_gate(
    dys, zs, ys, dz, dz_row: tl.constexpr, own, e, inside, L: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Return the gradients of the scan's output before the gate SiLU(z). If `ys` has this output, also store z's gradients."""
    before = ()
    for j in tl.static_range(len(dys)):
        gate_e = sigmoid(zs[j])
        if len(ys) > 0:
            dz_e = ys[j] * (dys[j] * gate_e * (1.0 + zs[j] * (1.0 - gate_e)))
            store(dz, dz_row, own, j * SPLIT, e, dz_e, inside, L, REVERSE)
        before += (dys[j] * (zs[j] * gate_e),)
    return before


@triton.jit
def _load_own(x, x_row, own, e, inside, L: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr):
    """Load a lane's own steps of a chunk."""
    xs = ()
    for j in tl.static_range(0, CHUNK, SPLIT):
        xs += (load(x, x_row, own, j, e, inside, L, REVERSE),)
    return xs


@triton.jit
def _touch_chunk(
    u, delta, z, dy, kept_y, h_high, h_low, BC, u_row, delta_row, z_row, dy_row, chunk, e, E: tl.constexpr, L: tl.constexpr,
    N: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr, GATE_GRADIENT: tl.constexpr, STATE_ROWS: tl.constexpr,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Touch the inputs that a chunk loads, and the states at its start."""
    LENGTH: tl.constexpr = (L + CHUNK - 1) // CHUNK * CHUNK
    ROWS: tl.constexpr = buffer_rows(L, STATE_ROWS, CHUNK)
    first, state = chunk * CHUNK, tl.maximum(chunk - 1, 0) * STATE_ROWS
    touched = touch_by_state(BC, first, e, LENGTH, N, CHUNK, REVERSE)
    if SPLIT != 2:  # with two lanes per channel, the kernel has no registers left for these loads, and would spill
        touched += touch_halves(h_high, h_low, E, state, e, E, ROWS, N, SPLIT, REVERSE)
        touched += touch_steps(u, u_row, first, e, E, L, CHUNK, SPLIT, REVERSE)
        touched += touch_steps(delta, delta_row, first, e, E, L, CHUNK, SPLIT, REVERSE)
    touched += touch_steps(dy, dy_row, first, e, E, L, CHUNK, SPLIT, REVERSE)
    if GATED:
        touched += touch_steps(z, z_row, first, e, E, L, CHUNK, SPLIT, REVERSE)
    if GATE_GRADIENT:
        touched += touch_steps(kept_y, E, first, e, E, L, CHUNK, SPLIT, REVERSE)
    return touched


@triton.jit
def _one_way_gradients(
    inputs, z, dy, h_halves, warp_sums, gradients, dBC, parameters, kept_y, dz,
    u_row: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr, dz_row: tl.constexpr,
    A_channel: tl.constexpr, A_state: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr,
    GATE_GRADIENT: tl.constexpr, PRODUCTS: tl.constexpr, STATE_ROWS: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute one direction's gradients, from the last chunk to the first."""
    e, batch = channels_of(LANES, WARPS, SPLIT), tl.program_id(1).to(tl.int64)
    inside, rows, program = e < E, batch * L, tl.program_id(0) * tl.num_programs(1) + batch
    CHUNKS: tl.constexpr = (L + CHUNK - 1) // CHUNK
    LENGTH: tl.constexpr = CHUNKS * CHUNK
    BOTH: tl.constexpr = 2 * N * LENGTH
    u, delta, A, BC, D, bias = inputs
    du, ddelta = gradients
    u, delta, BC = u + rows * u_row, delta + rows * delta_row, BC + batch * BOTH
    z, dy, du, ddelta = z + rows * z_row, dy + rows * dy_row, du + rows * E, ddelta + rows * E
    kept_y, dz = kept_y + rows * E, dz + rows * dz_row
    h_high, h_low = state_buffer(h_halves[0], h_halves[1], batch, E, L, STATE_ROWS, CHUNK)
    dA = parameters + batch * (2 * N + 2) * E
    warp_sums, dBC = warp_sums + program * N * WARPS * LANES, dBC + program * BOTH
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    bias_e = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    dD_e, dbias_e = tl.zeros_like(D_e), tl.zeros_like(D_e)
    HELD: tl.constexpr = N // SPLIT
    share = share_of(e, SPLIT)
    touched = _touch_chunk(
        u, delta, z, dy, kept_y, h_high, h_low, BC, u_row, delta_row, z_row, dy_row, CHUNKS - 1, e, E, L, N, REVERSE, GATED,
        GATE_GRADIENT, STATE_ROWS, SPLIT, CHUNK,
    )  # fmt: skip
    for chunk in range(CHUNKS):
        first = (CHUNKS - 1 - chunk) * CHUNK
        own = first + share
        settle(touched)
        touched = _touch_chunk(
            u, delta, z, dy, kept_y, h_high, h_low, BC, u_row, delta_row, z_row, dy_row, tl.maximum(CHUNKS - 2 - chunk, 0), e,
            E, L, N, REVERSE, GATED, GATE_GRADIENT, STATE_ROWS, SPLIT, CHUNK,
        )  # fmt: skip
        zs, ys, own_delta_us, d_delta_us, d_deltas = (), (), (), (), ()
        raws = _load_own(delta, delta_row, own, e, inside, L, CHUNK, SPLIT, REVERSE)
        us = _load_own(u, u_row, own, e, inside, L, CHUNK, SPLIT, REVERSE)
        own_dys = _load_own(dy, dy_row, own, e, inside, L, CHUNK, SPLIT, REVERSE)
        if GATED:
            zs = _load_own(z, z_row, own, e, inside, L, CHUNK, SPLIT, REVERSE)
            if GATE_GRADIENT:
                ys = _load_own(kept_y, E, own, e, inside, L, CHUNK, SPLIT, REVERSE)
            own_dys = _through_gate(own_dys, zs, ys, dz, dz_row, own, e, inside, L, SPLIT, REVERSE)
        own_deltas = step_sizes(raws, bias_e, own, inside, L, SPLIT)
        for j in tl.static_range(len(us)):
            own_delta_us += (own_deltas[j] * us[j],)
        deltas, delta_us = spread(own_deltas, SPLIT), spread(own_delta_us, SPLIT)
        dys = spread(own_dys, SPLIT)
        for _ in tl.static_range(CHUNK):
            d_delta_us, d_deltas = d_delta_us + (tl.zeros_like(D_e),), d_deltas + (tl.zeros_like(D_e),)
        prefetched = _load_state(
            A, h_high, h_low, dA, share, first, e, inside, A_channel, A_state, E, L, N, REVERSE, STATE_ROWS, CHUNK
        )
        then = _load_state(
            A, h_high, h_low, dA, min(1, HELD - 1) * SPLIT + share, first, e, inside, A_channel, A_state, E, L, N, REVERSE,
            STATE_ROWS, CHUNK,
        )  # fmt: skip
        for i in range(HELD):
            n, later_n = i * SPLIT + share, min(i + 2, HELD - 1) * SPLIT + share
            A_e, h_e, carry_e, dA_e = prefetched  # the data of the next two states is loaded while this one is computed
            prefetched = then
            then = _load_state(
                A, h_high, h_low, dA, later_n, first, e, inside, A_channel, A_state, E, L, N, REVERSE, STATE_ROWS, CHUNK
            )
            B_t = load_steps(BC + 4 * SPLIT * i, first, e, CHUNK, LENGTH, N, SPLIT, REVERSE)
            C_t = load_steps(BC + (N * LENGTH + 4 * SPLIT * i), first, e, CHUNK, LENGTH, N, SPLIT, REVERSE)
            decays, states = _recompute_states(h_e, A_e, B_t, deltas, delta_us)
            carry_e, dA_e, d_delta_us, d_deltas, parts = _backpropagate_states(
                carry_e, dA_e, A_e, B_t, C_t, deltas, delta_us, dys, decays, states, d_delta_us, d_deltas,
                SPLIT, REVERSE, PRODUCTS,
            )  # fmt: skip
            tl.store(dA + (n * E + e) + (N + 2) * E, carry_e, mask=inside)
            tl.store(dA + (n * E + e), dA_e, mask=inside)
            _store_parts(warp_sums, n, parts, e, WARPS, SPLIT, PRODUCTS)
        tl.debug_barrier()  # all warps have stored their sums
        _sum_warps(warp_sums, dBC, first, L, N, REVERSE, LANES, WARPS, STATES, CHUNK)
        tl.debug_barrier()  # the sums have been read
        chunk_dD_e, chunk_dbias_e = _store_gradients(
            u, delta, u_row, delta_row, bias_e, D_e, du, ddelta, own_deltas, own_dys, collect(d_delta_us, SPLIT),
            collect(d_deltas, SPLIT), own, e, inside, E, L, SPLIT, REVERSE,
        )  # fmt: skip
        dD_e += chunk_dD_e
        dbias_e += chunk_dbias_e
    _store_vector_gradients(dA + N * E + e, E, dD_e, dbias_e, share, inside, SPLIT)


@triton.jit
def scan_backward(
    inputs, z, dy, h_halves, warp_sums, gradients, dBC, parameters, kept_y, dz,
    u_rows: tl.constexpr, delta_rows: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr, dz_row: tl.constexpr,
    A_channel: tl.constexpr, A_state: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr,
    GATE_GRADIENT: tl.constexpr, PRODUCTS: tl.constexpr, STATE_ROWS: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one direction, or of both directions at once (axis 2). scan_forward must have stored the states."""
    for way in tl.static_range(len(inputs)):
        if tl.program_id(2) == way:
            _one_way_gradients(
                inputs[way], z, dy, h_halves[way], warp_sums[way], gradients[way], dBC[way], parameters[way], kept_y, dz,
                u_rows[way], delta_rows[way], z_row, dy_row, dz_row, A_channel, A_state, E, L, N, (way == 1) != REVERSE, GATED,
                GATE_GRADIENT and way == len(inputs) - 1, PRODUCTS, STATE_ROWS, LANES, WARPS, SPLIT, STATES, CHUNK,
            )  # fmt: skip
