# mypy: ignore-errors
# What Triton compiles is no Python: types are those of its own compiler.
"""One program that walks a chunk of operations in order, one example at a time, in Triton; shapes: `triton_scan`.

The dense weights are loaded once, live in the program's registers, and are stored when the chunk is done. What the
optimiser holds of them, and rows of the table, stay where they are: each is read when it is needed and written when it
has moved, by this one program, so nobody has to wait but its own threads. What several slots ask of one row is summed
in their order: the same chunk gives the same bits.

`P` behind the name of a size is that size rounded up to a power of two, as Triton's tensors are; what stands in the
padding is 0 and stays 0.
"""

import triton
import triton.language as tl

SGD, ADAGRAD, FTRL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)
LEARN = tl.constexpr(1)


@triton.jit
def root_of(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    return tl.sqrt_rn(x)


@triton.jit
def move(w, g, at, mask, slots_a, slots_b, rate, l1, l2, OPTIMIZER: tl.constexpr):
    """Weights after one update, and their slots, which lie at `at`; see `streamcl.engine.optimizers`."""
    if OPTIMIZER == SGD:
        w = w - rate * (g + l2 * w)
    elif OPTIMIZER == ADAGRAD:
        g = g + l2 * w
        total = tl.load(slots_a + at, mask=mask, other=1.0) + g * g
        tl.store(slots_a + at, total, mask=mask)
        w = w - rate * (g / root_of(total))
    else:
        before = tl.load(slots_b + at, mask=mask, other=0.0)
        total = before + g * g
        root = root_of(total)
        z = tl.load(slots_a + at, mask=mask, other=0.0) + g - (root - root_of(before)) / rate * w
        tl.store(slots_a + at, z, mask=mask)
        tl.store(slots_b + at, total, mask=mask)
        shrunk = z - tl.minimum(tl.maximum(z, -l1), l1)
        w = -shrunk / ((1.0 + root) / rate + l2)
    return w


@triton.jit
def pooled(
    base,
    f,
    d,
    mask,
    ids,
    weights,
    field_start,
    field_slots,
    table,
    KIND: tl.constexpr,
    W: tl.constexpr,
    FIRST: tl.constexpr,
    BAG: tl.constexpr,
):
    """Numbers d of the embeddings of fields f: their slots' rows, weighted and summed."""
    start = tl.load(field_start + f, mask=mask, other=0)
    many = tl.load(field_slots + f, mask=mask, other=0)
    x = tl.zeros(mask.shape, KIND)
    for k in range(BAG):
        there = mask & (k < many)
        weight = tl.load(weights + base + start + k, mask=there, other=0.0)
        there = there & (weight != 0.0)
        id = tl.load(ids + base + start + k, mask=there, other=0)
        x += weight.to(KIND) * tl.load(table + id * W + FIRST + d, mask=there, other=0.0)
    return x


@triton.jit
def rectified(x):
    return tl.where(x < 0.0, 0.0, x)  # NaN stays


@triton.jit
def row_gradients(
    n, t, c, weights, distinct, order, starts, slot_field, dx, px, dz,
    KIND: tl.constexpr, S: tl.constexpr, T: tl.constexpr, FD: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    FIRST: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """(TP, WP) of the touched rows t: what each slot that is one of them gets, in the order of the slots."""
    valid = t < tl.load(distinct + n)
    low = tl.load(starts + n * (T + 1) + t, mask=valid, other=0)
    high = tl.load(starts + n * (T + 1) + t + 1, mask=valid, other=0)
    inside = (c < W)[None, :]
    total = tl.zeros([t.shape[0], c.shape[0]], KIND)
    for j in range(tl.max(high - low, 0)):
        there = low + j < high
        k = tl.load(order + n * T + low + j, mask=there, other=0)
        weight = tl.load(weights + n * T + k, mask=there, other=0.0)
        there = there & (weight != 0.0)
        b, s = k // S, k % S
        at = b * FD + tl.load(slot_field + s, mask=there, other=0) * D
        cell = at[:, None] + (c - FIRST)[None, :]
        numbers = there[:, None] & inside & (c >= FIRST)[None, :]
        g = tl.load(dx + cell, mask=numbers, other=0.0)
        if PAIRS:
            g += tl.load(px + cell, mask=numbers, other=0.0)
        if FIRST == 1:
            first = tl.load(dz + b, mask=there, other=0.0)
            g = tl.where((c == 0)[None, :], first[:, None], g)
        total += tl.where(there[:, None] & inside, weight.to(KIND)[:, None] * g, 0.0)
    return total


@triton.jit
def scan(
    count, kind, ids, weights, numbers, y, share, touched, distinct, order, starts,
    slot_field, field_start, field_slots, flat, flat_a, flat_b, table, table_a, table_b, settings,
    dx, px, dz, mean, mean_use, found_output, found_entered, found_hidden, found_norm, done,
    AT_W1: tl.constexpr, AT_B1: tl.constexpr, AT_W2: tl.constexpr, AT_B2: tl.constexpr, AT_W3: tl.constexpr,
    AT_B3: tl.constexpr, AT_LW: tl.constexpr, AT_LB: tl.constexpr,
    B: tl.constexpr, S: tl.constexpr, F: tl.constexpr, D: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    BAG: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, SP: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr,
    NP: tl.constexpr, EP: tl.constexpr, WP: tl.constexpr, TP: tl.constexpr, H1P: tl.constexpr, H2P: tl.constexpr,
    HP: tl.constexpr, FIRST: tl.constexpr, PAIRS: tl.constexpr, OPTIMIZER: tl.constexpr, RENEW1: tl.constexpr,
    RENEW2: tl.constexpr, LOOKS: tl.constexpr, WATCHES: tl.constexpr,
):  # fmt: skip
    """Operations 0, ..., count - 1, up to the first that can't be learned; `done` () is how many were."""
    KIND: tl.constexpr = flat.dtype.element_ty
    E: tl.constexpr = F * D + N
    T: tl.constexpr = B * S
    TWO: tl.constexpr = H2 > 0
    H: tl.constexpr = H2 if H2 > 0 else H1
    e, i1, i2, ih = tl.arange(0, EP), tl.arange(0, H1P), tl.arange(0, H2P), tl.arange(0, HP)
    inum, c, isl = tl.arange(0, NP), tl.arange(0, WP), tl.arange(0, SP)
    fe = e // D
    de = e - fe * D
    embedded = e < F * D
    m1 = (i1 < H1)[:, None] & (e < E)[None, :]
    o1 = AT_W1 + i1[:, None] * E + e[None, :]
    m2 = (i2 < H2)[:, None] & (i1 < H1)[None, :]
    o2 = AT_W2 + i2[:, None] * H1 + i1[None, :]
    rate, l1, l2 = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    row_rate, largest = tl.load(settings + 3), tl.load(settings + 4)
    fresh, shift = tl.load(settings + 5), tl.load(settings + 6)

    one, linear = tl.arange(0, 1), (inum < N) & PAIRS
    w1, b1 = tl.load(flat + o1, mask=m1, other=0.0), tl.load(flat + AT_B1 + i1, mask=i1 < H1, other=0.0)
    w2, b2 = tl.load(flat + o2, mask=m2, other=0.0), tl.load(flat + AT_B2 + i2, mask=i2 < H2, other=0.0)
    w3, b3 = tl.load(flat + AT_W3 + ih, mask=ih < H, other=0.0), tl.load(flat + AT_B3 + one)
    lw, lb = tl.load(flat + AT_LW + inum, mask=linear, other=0.0), tl.load(flat + AT_LB + one)
    u1, v1 = i1 * 0.0, i1 * 0.0
    u2, v2 = i2 * 0.0, i2 * 0.0
    if RENEW1 >= 0:
        u1 = tl.load(mean + RENEW1 + i1, mask=i1 < H1, other=0.0)
        v1 = tl.load(mean_use + RENEW1 + i1, mask=i1 < H1, other=0.0)
    if RENEW2 >= 0:
        u2 = tl.load(mean + RENEW2 + i2, mask=i2 < H2, other=0.0)
        v2 = tl.load(mean_use + RENEW2 + i2, mask=i2 < H2, other=0.0)

    taken, n = 0, 0
    alive = count > 0
    while alive:
        learns = tl.load(kind + n) == LEARN
        if B > 1:
            g1, g2 = tl.zeros([H1P, EP], KIND), tl.zeros([H2P, H1P], KIND)
        x, h1, h2 = tl.zeros([EP], KIND), tl.zeros([H1P], KIND), tl.zeros([H2P], KIND)
        e1, e2 = tl.zeros([H1P], KIND), tl.zeros([H2P], KIND)
        gb1, gb2 = tl.zeros([H1P], KIND), tl.zeros([H2P], KIND)
        g3, gb3 = tl.zeros([HP], KIND), tl.zeros([1], KIND)
        glw = tl.zeros([NP], KIND)
        s1, s2 = tl.zeros([H1P], KIND), tl.zeros([H2P], KIND)
        rows = tl.where(learns, B, 1)
        for b in range(rows):
            at = n * B + b
            x = pooled(at * S, fe, de, embedded, ids, weights, field_start, field_slots, table, KIND, W, FIRST, BAG)
            if N > 0:
                tail = (e >= F * D) & (e < E)
                x += tl.load(numbers + at * N + e - F * D, mask=tail, other=0.0).to(KIND)
            h1 = rectified(tl.sum(w1 * x[None, :], 1) + b1)
            if TWO:
                h2 = rectified(tl.sum(w2 * h1[None, :], 1) + b2)
                z = tl.sum(w3 * h2, 0) + tl.sum(b3, 0)
            else:
                h2 = tl.zeros([H2P], KIND)
                z = tl.sum(w3 * h1, 0) + tl.sum(b3, 0)
            if PAIRS:
                weight = tl.load(weights + at * S + isl, mask=isl < S, other=0.0)
                there = (isl < S) & (weight != 0.0)
                id = tl.load(ids + at * S + isl, mask=there, other=0)
                z += tl.sum(weight.to(KIND) * tl.load(table + id * W, mask=there, other=0.0), 0) + tl.sum(lb, 0)
                number = tl.load(numbers + at * N + inum, mask=inum < N, other=0.0).to(KIND)
                z += tl.sum(lw * number, 0)
                f2, d2 = tl.arange(0, FP)[:, None], tl.arange(0, DP)[None, :]
                inside = (f2 < F) & (d2 < D)
                vectors = pooled(
                    at * S, f2 + d2 * 0, d2 + f2 * 0, inside, ids, weights, field_start, field_slots, table,
                    KIND, W, FIRST, BAG,
                )  # fmt: skip
                total = tl.sum(vectors, 0)
                z += 0.5 * tl.sum(total * total - tl.sum(vectors * vectors, 0), 0)
            if b == 0:
                tl.store(found_output + n, z)
                if LOOKS:
                    tl.store(found_entered + n * E + e, x, mask=e < E)
                if LOOKS or WATCHES:
                    tl.store(found_hidden + n * (H1 + H2) + i1, h1, mask=i1 < H1)
                    if TWO:
                        tl.store(found_hidden + n * (H1 + H2) + H1 + i2, h2, mask=i2 < H2)
            if learns:
                slope = 1.0 / (1.0 + tl.exp(-(z + shift))) - tl.load(y + at).to(KIND)
                slope = slope * tl.load(share + at)
                if TWO:
                    g3 += slope * h2
                    e2 = tl.where(h2 > 0.0, slope * w3, 0.0)
                    if B > 1:
                        g2 += e2[:, None] * h1[None, :]
                    gb2 += e2
                    back = tl.sum(w2 * e2[:, None], 0)
                else:
                    g3 += slope * h1
                    back = slope * w3
                e1 = tl.where(h1 > 0.0, back, 0.0)
                gb3 += slope
                if B > 1:
                    g1 += e1[:, None] * x[None, :]
                gb1 += e1
                s1 += h1
                s2 += h2
                tl.store(dx + b * (F * D) + e, tl.sum(w1 * e1[:, None], 0), mask=embedded)
                tl.store(dz + b, slope)
                if PAIRS:
                    glw += slope * number
                    pull = slope * (total[None, :] - vectors)
                    tl.store(px + b * (F * D) + f2 * D + d2, pull, mask=inside)
        if learns:
            tl.debug_barrier()  # what one thread has stored of the rows' gradients others read
            if B == 1:  # the gradient of a layer is a product of two vectors, and is never held
                g1, g2 = e1[:, None] * x[None, :], e2[:, None] * h1[None, :]
                dense = tl.sum(e1 * e1, 0) * tl.sum(x * x, 0) + tl.sum(e2 * e2, 0) * tl.sum(h1 * h1, 0)
            else:
                dense = tl.sum(tl.sum(g1 * g1, 1), 0) + tl.sum(tl.sum(g2 * g2, 1), 0)
            dense += tl.sum(gb1 * gb1, 0) + tl.sum(gb2 * gb2, 0) + tl.sum(g3 * g3, 0) + tl.sum(gb3 * gb3, 0)
            if PAIRS:
                dense += tl.sum(glw * glw, 0) + tl.sum(gb3 * gb3, 0)
            squares = dense
            for start in range(0, T, TP):
                t = start + tl.arange(0, TP)
                g = row_gradients(
                    n,
                    t,
                    c,
                    weights,
                    distinct,
                    order,
                    starts,
                    slot_field,
                    dx,
                    px,
                    dz,
                    KIND,
                    S,
                    T,
                    F * D,
                    D,
                    W,
                    FIRST,
                    PAIRS,
                )
                squares += tl.sum(tl.sum(g * g, 1), 0)
            alive = root_of(squares) <= largest  # False also when it is NaN
            tl.store(found_norm + n, root_of(dense))
            if alive:
                w1 = move(w1, g1, o1, m1, flat_a, flat_b, rate, l1, l2, OPTIMIZER)
                b1 = move(b1, gb1, AT_B1 + i1, i1 < H1, flat_a, flat_b, rate, l1, l2, OPTIMIZER)
                if TWO:
                    w2 = move(w2, g2, o2, m2, flat_a, flat_b, rate, l1, l2, OPTIMIZER)
                    b2 = move(b2, gb2, AT_B2 + i2, i2 < H2, flat_a, flat_b, rate, l1, l2, OPTIMIZER)
                w3 = move(w3, g3, AT_W3 + ih, ih < H, flat_a, flat_b, rate, l1, l2, OPTIMIZER)
                b3 = move(b3, gb3, AT_B3 + one, one < 1, flat_a, flat_b, rate, l1, l2, OPTIMIZER)
                if PAIRS:
                    lw = move(lw, glw, AT_LW + inum, linear, flat_a, flat_b, rate, l1, l2, OPTIMIZER)
                    lb = move(lb, gb3, AT_LB + one, one < 1, flat_a, flat_b, rate, l1, l2, OPTIMIZER)
                if RENEW1 >= 0:
                    u1 += fresh * (s1 / B - u1)
                    v1 += fresh * (s1 / B - v1)
                if RENEW2 >= 0:
                    u2 += fresh * (s2 / B - u2)
                    v2 += fresh * (s2 / B - v2)
                for start in range(0, T, TP):
                    t = start + tl.arange(0, TP)
                    g = row_gradients(
                        n,
                        t,
                        c,
                        weights,
                        distinct,
                        order,
                        starts,
                        slot_field,
                        dx,
                        px,
                        dz,
                        KIND,
                        S,
                        T,
                        F * D,
                        D,
                        W,
                        FIRST,
                        PAIRS,
                    )
                    valid = (t < tl.load(distinct + n))[:, None] & (c < W)[None, :]
                    id = tl.load(touched + n * T + t, mask=t < T, other=0)
                    cell = id[:, None] * W + c[None, :]
                    row = tl.load(table + cell, mask=valid, other=0.0)
                    row = move(row, g, cell, valid, table_a, table_b, row_rate, l1, l2, OPTIMIZER)
                    tl.store(table + cell, row, mask=valid)
            tl.debug_barrier()  # the rows have moved for all threads, and there is room for the next gradients
        taken += alive.to(tl.int32)
        n += 1
        alive = alive & (n < count)
    tl.store(flat + o1, w1, mask=m1)
    tl.store(flat + AT_B1 + i1, b1, mask=i1 < H1)
    if TWO:
        tl.store(flat + o2, w2, mask=m2)
        tl.store(flat + AT_B2 + i2, b2, mask=i2 < H2)
    tl.store(flat + AT_W3 + ih, w3, mask=ih < H)
    tl.store(flat + AT_B3 + one, b3)
    if PAIRS:
        tl.store(flat + AT_LW + inum, lw, mask=linear)
        tl.store(flat + AT_LB + one, lb)
    if RENEW1 >= 0:
        tl.store(mean + RENEW1 + i1, u1, mask=i1 < H1)
        tl.store(mean_use + RENEW1 + i1, v1, mask=i1 < H1)
    if RENEW2 >= 0:
        tl.store(mean + RENEW2 + i2, u2, mask=i2 < H2)
        tl.store(mean_use + RENEW2 + i2, v2, mask=i2 < H2)
    tl.store(done, taken)
