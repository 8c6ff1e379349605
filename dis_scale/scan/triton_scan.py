"""The Triton backend's scan: the kernel scan_forward, which triton.py launches. Read first: triton_tiles.py."""

import triton
import triton.language as tl

from dis_scale.scan.triton_tiles import (
    address,
    channels_of,
    collect,
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
    store_halves,
    touch_by_state,
    touch_halves,
    touch_steps,
)


@triton.jit
def _initial_states(
    A, e, inside, A_channel: tl.constexpr, A_state: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Return a lane's initial states, which are zero, and A / ln 2 for each of them."""
    h, A_n = (), ()
    for n in tl.static_range(0, N, SPLIT):
        h += (tl.zeros(e.shape, tl.float32),)
        A_n += (load_scaled(A, n + share_of(e, SPLIT), e, inside, A_channel, A_state),)
    return h, A_n


@triton.jit
def _advance(
    h, A_n, BC, D_e, own_deltas, us, first, e, LENGTH: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
    REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """Advance a lane's states by a group of steps. If OUTPUT, also compute y at the lane's own steps."""
    states, ys, own_delta_us = (), (), ()
    for j in tl.static_range(len(us)):
        own_delta_us += (own_deltas[j] * us[j],)
    deltas, delta_us = spread(own_deltas, SPLIT), spread(own_delta_us, SPLIT)
    STEPS: tl.constexpr = len(deltas)
    for j in tl.static_range(STEPS):
        ys += (D_e * us[j] if SPLIT == 1 else tl.zeros_like(D_e),)
    for i in tl.static_range(len(h)):
        h_e, sums = h[i], ()
        B_t = load_steps(BC + 4 * SPLIT * i, first, e, STEPS, LENGTH, N, SPLIT, REVERSE)
        if OUTPUT:
            C_t = load_steps(BC + (N * LENGTH + 4 * SPLIT * i), first, e, STEPS, LENGTH, N, SPLIT, REVERSE)
        for j in tl.static_range(STEPS):
            h_e = tl.exp2(deltas[j] * A_n[i]) * h_e + delta_us[j] * B_t[j]
            if OUTPUT:
                sums += (ys[j] + h_e * C_t[j],)
        states += (h_e,)
        if OUTPUT:
            ys = sums
    if SPLIT > 1 and OUTPUT:
        parts, ys = collect(ys, SPLIT), ()
        for j in tl.static_range(len(us)):
            ys += (D_e * us[j] + parts[j],)
    return states, ys


@triton.jit
def _load_group(
    u, delta, z, dy, y_high, y_low, u_row, delta_row, z_row, dy_row, first, e, inside, E: tl.constexpr, L: tl.constexpr,
    STEPS: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr, SECOND: tl.constexpr, GATE: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
):  # fmt: skip
    """Load the inputs of a lane's own steps in a group: raw delta and u, the first direction's y if SECOND, z if GATE, and also dy,
    for z's gradient, if FOR_BACKWARD."""
    raws, us, ys, zs, dys = (), (), (), (), ()
    for j in tl.static_range(0, STEPS, SPLIT):
        raws += (load(delta, delta_row, first, j, e, inside, L, REVERSE),)
        us += (load(u, u_row, first, j, e, inside, L, REVERSE),)
        if SECOND:
            high, low = address(y_high, E, first, j, e, L, REVERSE), address(y_low, E, first, j, e, L, REVERSE)
            ys += (load_halves(high, low, inside & (first + j < L)),)
        if GATE:
            zs += (load(z, z_row, first, j, e, inside, L, REVERSE),)
            if FOR_BACKWARD:
                dys += (load(dy, dy_row, first, j, e, inside, L, REVERSE),)
    return raws, us, ys, zs, dys


@triton.jit
def _touch_inputs(
    u, delta, z, dy, y_high, y_low, BC, u_row, delta_row, z_row, dy_row, first, e, E: tl.constexpr, L: tl.constexpr,
    LENGTH: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr,
    SECOND: tl.constexpr, GATE: tl.constexpr, FOR_BACKWARD: tl.constexpr,
):  # fmt: skip
    """Touch the numbers that `_load_group` and `_advance` load for the group of steps from `first`."""
    touched = touch_by_state(BC, first, e, LENGTH, N, STEPS, REVERSE)
    touched += touch_steps(u, u_row, first, e, E, L, STEPS, SPLIT, REVERSE)
    touched += touch_steps(delta, delta_row, first, e, E, L, STEPS, SPLIT, REVERSE)
    if SECOND:
        touched += touch_halves(y_high, y_low, E, first, e, E, L, STEPS, SPLIT, REVERSE)
    if GATE:
        touched += touch_steps(z, z_row, first, e, E, L, STEPS, SPLIT, REVERSE)
        if FOR_BACKWARD:
            touched += touch_steps(dy, dy_row, first, e, E, L, STEPS, SPLIT, REVERSE)
    return touched


@triton.jit
def _store_output(
    ys, first_ys, zs, dys, out, y_high, y_low, kept_y, out_row, first, e, inside, E: tl.constexpr, L: tl.constexpr,
    SPLIT: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, GATE: tl.constexpr,
    FOR_BACKWARD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Store y for the second direction if FIRST. Otherwise add the first direction's y, if any, apply the gate, if any, and store y
    or z's gradient."""
    for j in tl.static_range(len(ys)):
        y_e, step = ys[j], j * SPLIT
        if SECOND:
            y_e += first_ys[j]
        if GATE:
            if KEEP:
                store(kept_y, E, first, step, e, y_e, inside, L, REVERSE)
            gate = sigmoid(zs[j])
            if FOR_BACKWARD:
                y_e *= dys[j] * gate * (1.0 + zs[j] * (1.0 - gate))
            else:
                y_e *= zs[j] * gate
        if FIRST:
            high, low = address(y_high, E, first, step, e, L, REVERSE), address(y_low, E, first, step, e, L, REVERSE)
            store_halves(high, low, y_e, inside & (first + step < L))
        else:
            store(out, out_row, first, step, e, y_e, inside, L, REVERSE)


@triton.jit
def scan_forward(
    inputs, z, dy, out, y_halves, h_halves, kept_y,
    u_row: tl.constexpr, delta_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr, out_row: tl.constexpr,
    A_channel: tl.constexpr, A_state: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    GATED: tl.constexpr, FOR_BACKWARD: tl.constexpr, KEEP: tl.constexpr, STATE_ROWS: tl.constexpr,
    LANES: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scan one direction and store y. With FOR_BACKWARD, store the states instead and, if GATED, y for the second direction or the
    gradient of z."""
    e, batch = channels_of(LANES, WARPS, SPLIT), tl.program_id(1).to(tl.int64)
    inside, rows = e < E, batch * L  # the only 64-bit number: within a batch row, distances fit 32 bits
    CHUNKS: tl.constexpr = (L + CHUNK - 1) // CHUNK
    LENGTH: tl.constexpr = CHUNKS * CHUNK
    STEPS: tl.constexpr = 4 if SPLIT == 1 else CHUNK
    OUTPUT: tl.constexpr = GATED or not FOR_BACKWARD
    GATE: tl.constexpr = GATED and not FIRST
    u, delta, A, BC, D, bias = inputs
    u, delta, BC = u + rows * u_row, delta + rows * delta_row, BC + batch * (2 * N * LENGTH)
    z, dy, out, kept_y = z + rows * z_row, dy + rows * dy_row, out + rows * out_row, kept_y + rows * E
    y_high, y_low = y_halves[0] + rows * E, y_halves[1] + rows * E
    h_high, h_low = state_buffer(h_halves[0], h_halves[1], batch, E, L, STATE_ROWS, CHUNK)
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    bias_e = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    share = share_of(e, SPLIT)
    h, A_n = _initial_states(A, e, inside, A_channel, A_state, N, SPLIT)
    touched = _touch_inputs(
        u, delta, z, dy, y_high, y_low, BC, u_row, delta_row, z_row, dy_row, 0, e, E, L, LENGTH, N, STEPS, SPLIT, REVERSE,
        SECOND, GATE, FOR_BACKWARD,
    )  # fmt: skip
    for chunk in range(CHUNKS if OUTPUT else CHUNKS - 1):
        for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, L), STEPS):
            settle(touched)
            touched = _touch_inputs(
                u, delta, z, dy, y_high, y_low, BC, u_row, delta_row, z_row, dy_row, tl.minimum(first + STEPS, LENGTH - STEPS),
                e, E, L, LENGTH, N, STEPS, SPLIT, REVERSE, SECOND, GATE, FOR_BACKWARD,
            )  # fmt: skip
            raws, us, first_ys, zs, dys = _load_group(
                u, delta, z, dy, y_high, y_low, u_row, delta_row, z_row, dy_row, first + share, e, inside, E, L,
                STEPS, SPLIT, REVERSE, SECOND, GATE, FOR_BACKWARD,
            )  # fmt: skip
            deltas = step_sizes(raws, bias_e, first + share, inside, L, SPLIT)
            h, ys = _advance(h, A_n, BC, D_e, deltas, us, first, e, LENGTH, N, SPLIT, REVERSE, OUTPUT)
            if OUTPUT:
                _store_output(
                    ys, first_ys, zs, dys, out, y_high, y_low, kept_y, out_row, first + share, e, inside, E, L,
                    SPLIT, REVERSE, FIRST, SECOND, GATE, FOR_BACKWARD, KEEP,
                )  # fmt: skip
        if FOR_BACKWARD or KEEP:
            for i in tl.static_range(N // SPLIT):
                at = state_row(chunk, i * SPLIT + share, L, STATE_ROWS, CHUNK, REVERSE) * E + e
                store_halves(h_high + at, h_low + at, h[i], inside & (chunk < CHUNKS - 1))
