"""The kernels of `jllm.models.kernels.packed_attention`: outputs, then gradients of queries, then of keys and values.

A program works on rows: `width` positions of `together` heads that share a key head. Exponentials are to base 2.
Arguments of one name are the same in all: `bounds` of `count` documents, found in `steps` of bisection; `*_step` and
`*_head` are strides between tokens and between heads; `groups` query heads share a key head; `scale` is that of scores,
`factor` that of their gradients.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _document(bounds, places, steps: tl.constexpr, count):  # type: ignore[no-untyped-def]
    # The last bound that is no later than a place, by bisection.
    low = places * 0
    high = places * 0 + count
    for _ in tl.static_range(steps):
        middle = (low + high) // 2
        is_before = tl.load(bounds + middle) <= places
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit  # type: ignore[untyped-decorator]
def _seen_keys(  # type: ignore[no-untyped-def]
    bounds, positions, begin, last, tokens, count, steps: tl.constexpr, window: tl.constexpr, keys: tl.constexpr
):
    # Of each row the first key that it sees, and keys from `start` to `end`, of which all rows see those between
    # `unmasked` and `diagonal`; `begin` and `last` are the program's first and last position.
    earliest = tl.load(bounds + _document(bounds, tl.minimum(positions, tokens - 1), steps, count))
    start = tl.load(bounds + _document(bounds, begin, steps, count))
    whole = tl.load(bounds + _document(bounds, last, steps, count))
    if window is not None:
        earliest = tl.maximum(earliest, positions - window + 1)
        start = tl.maximum(start, begin - window + 1)
        whole = tl.maximum(whole, last - window + 1)
    end = last + 1
    unmasked = tl.minimum(start + (whole - start + keys - 1) // keys * keys, end)
    diagonal = unmasked + tl.maximum(begin + 1 - unmasked, 0) // keys * keys
    return earliest, start, unmasked, diagonal, end


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    output, highest, total, query, k, v, k_step, v_step, start, end, positions, earliest, tokens, scale,
    keys: tl.constexpr, size: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, keys)
    elements = tl.arange(0, size)
    for first in range(start, end, keys):
        places = first + columns
        k_places = k + places[None, :].to(tl.int64) * k_step + elements[:, None]
        v_places = v + places[:, None].to(tl.int64) * v_step + elements[None, :]
        if masked:
            key = tl.load(k_places, mask=places[None, :] < tokens, other=0.0)
        else:
            key = tl.load(k_places)
        scores = tl.dot(query, key) * scale
        if masked:
            seen = (places[None, :] <= positions[:, None]) & (places[None, :] >= earliest[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(weights, 1)
        if masked:
            value = tl.load(v_places, mask=places[:, None] < tokens, other=0.0)
        else:
            value = tl.load(v_places)
        output = tl.dot(weights.to(value.dtype), value, output * shrunk[:, None])
        highest = higher
    return output, highest, total


@triton.jit  # type: ignore[untyped-decorator]
def output(  # type: ignore[no-untyped-def]
    q, k, v, out, sums, bounds, q_step, q_head, k_step, k_head, v_step, v_head, tokens, heads, count, scale,
    steps: tl.constexpr, groups: tl.constexpr, together: tl.constexpr, window: tl.constexpr,
    rows: tl.constexpr, keys: tl.constexpr, size: tl.constexpr, lowest: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = rows // together
    # One dimension: a device takes 65,535 programs in the others, and rows may have a million tokens.
    begin = tl.program_id(0) // (heads // together) * width
    first_head = tl.program_id(0) % (heads // together) * together
    key_head = first_head // groups
    row = tl.arange(0, rows)
    positions = begin + row % width
    head = (first_head + row // width).to(tl.int64)
    inside = positions < tokens
    elements = tl.arange(0, size)
    k += key_head.to(tl.int64) * k_head
    v += key_head.to(tl.int64) * v_head
    query = tl.load(
        q + (positions.to(tl.int64) * q_step + head * q_head)[:, None] + elements[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    earliest, start, unmasked, diagonal, end = _seen_keys(
        bounds, positions, begin, tl.minimum(begin + width, tokens) - 1, tokens, count, steps, window, keys
    )
    found = tl.zeros((rows, size), tl.float32)
    highest = tl.full((rows,), lowest, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    found, highest, total = _attend(
        found, highest, total, query, k, v, k_step, v_step, start, unmasked, positions, earliest, tokens, scale,
        keys, size, True,
    )  # fmt: skip
    found, highest, total = _attend(
        found, highest, total, query, k, v, k_step, v_step, unmasked, diagonal, positions, earliest, tokens, scale,
        keys, size, False,
    )  # fmt: skip
    found, highest, total = _attend(
        found, highest, total, query, k, v, k_step, v_step, diagonal, end, positions, earliest, tokens, scale,
        keys, size, True,
    )  # fmt: skip
    places = (positions.to(tl.int64) * heads + head) * size
    tl.store(out + places[:, None] + elements[None, :], found / total[:, None], mask=inside[:, None])
    tl.store(sums + head * tokens + positions, highest + tl.log2(total), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _query_gradient(  # type: ignore[no-untyped-def]
    found, query, slope, total, delta, k, v, k_step, v_step, start, end, positions, earliest, tokens, scale,
    keys: tl.constexpr, size: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, keys)
    elements = tl.arange(0, size)
    for first in range(start, end, keys):
        places = first + columns
        k_places = k + places[None, :].to(tl.int64) * k_step + elements[:, None]
        v_places = v + places[None, :].to(tl.int64) * v_step + elements[:, None]
        if masked:
            key = tl.load(k_places, mask=places[None, :] < tokens, other=0.0)
            value = tl.load(v_places, mask=places[None, :] < tokens, other=0.0)
        else:
            key = tl.load(k_places)
            value = tl.load(v_places)
        weights = tl.exp2(tl.dot(query, key) * scale - total[:, None])
        if masked:
            seen = (places[None, :] <= positions[:, None]) & (places[None, :] >= earliest[:, None])
            weights = tl.where(seen, weights, 0.0)
        of_scores = weights * (tl.dot(slope, value) - delta[:, None])
        found = tl.dot(of_scores.to(key.dtype), tl.trans(key), found)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def of_queries(  # type: ignore[no-untyped-def]
    q, k, v, out, slopes, dq, sums, deltas, bounds,
    q_step, q_head, k_step, k_head, v_step, v_head, slope_step, slope_head, tokens, heads, count, scale, factor,
    steps: tl.constexpr, groups: tl.constexpr, together: tl.constexpr, window: tl.constexpr,
    rows: tl.constexpr, keys: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = rows // together
    # One dimension: a device takes 65,535 programs in the others, and rows may have a million tokens.
    begin = tl.program_id(0) // (heads // together) * width
    first_head = tl.program_id(0) % (heads // together) * together
    key_head = first_head // groups
    row = tl.arange(0, rows)
    positions = begin + row % width
    head = (first_head + row // width).to(tl.int64)
    inside = positions < tokens
    elements = tl.arange(0, size)
    k += key_head.to(tl.int64) * k_head
    v += key_head.to(tl.int64) * v_head
    long = positions.to(tl.int64)
    query = tl.load(q + (long * q_step + head * q_head)[:, None] + elements[None, :], mask=inside[:, None], other=0.0)
    slope = tl.load(
        slopes + (long * slope_step + head * slope_head)[:, None] + elements[None, :], mask=inside[:, None], other=0.0
    )
    places = ((long * heads + head) * size)[:, None] + elements[None, :]
    made = tl.load(out + places, mask=inside[:, None], other=0.0)
    delta = tl.sum(made.to(tl.float32) * slope.to(tl.float32), 1)
    tl.store(deltas + head * tokens + positions, delta, mask=inside)
    total = tl.load(sums + head * tokens + positions, mask=inside, other=0.0)
    earliest, start, unmasked, diagonal, end = _seen_keys(
        bounds, positions, begin, tl.minimum(begin + width, tokens) - 1, tokens, count, steps, window, keys
    )
    found = tl.zeros((rows, size), tl.float32)
    found = _query_gradient(
        found, query, slope, total, delta, k, v, k_step, v_step, start, unmasked, positions, earliest, tokens, scale,
        keys, size, True,
    )  # fmt: skip
    found = _query_gradient(
        found, query, slope, total, delta, k, v, k_step, v_step, unmasked, diagonal, positions, earliest, tokens, scale,
        keys, size, False,
    )  # fmt: skip
    found = _query_gradient(
        found, query, slope, total, delta, k, v, k_step, v_step, diagonal, end, positions, earliest, tokens, scale,
        keys, size, True,
    )  # fmt: skip
    tl.store(dq + places, found * factor, mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _key_gradient(  # type: ignore[no-untyped-def]
    dk, dv, key, value, q, slopes, sums, deltas, q_step, q_head, slope_step, slope_head, first_head,
    start, end, places, latest, tokens, scale,
    together: tl.constexpr, rows: tl.constexpr, size: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = rows // together
    row = tl.arange(0, rows)
    elements = tl.arange(0, size)
    head = (first_head + row // width).to(tl.int64)
    for first in range(start, end, width):
        positions = first + row % width
        long = positions.to(tl.int64)
        q_places = q + (long * q_step + head * q_head)[:, None] + elements[None, :]
        slope_places = slopes + (long * slope_step + head * slope_head)[:, None] + elements[None, :]
        if masked:
            inside = positions < tokens
            query = tl.load(q_places, mask=inside[:, None], other=0.0)
            slope = tl.load(slope_places, mask=inside[:, None], other=0.0)
            total = tl.load(sums + head * tokens + positions, mask=inside, other=0.0)
            delta = tl.load(deltas + head * tokens + positions, mask=inside, other=0.0)
        else:
            query = tl.load(q_places)
            slope = tl.load(slope_places)
            total = tl.load(sums + head * tokens + positions)
            delta = tl.load(deltas + head * tokens + positions)
        weights = tl.exp2(tl.dot(key, tl.trans(query)) * scale - total[None, :])
        if masked:
            seen = (positions[None, :] >= places[:, None]) & (positions[None, :] < latest[:, None])
            weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(slope.dtype), slope, dv)
        of_scores = weights * (tl.dot(value, tl.trans(slope)) - delta[None, :])
        dk = tl.dot(of_scores.to(query.dtype), query, dk)
    return dk, dv


@triton.jit  # type: ignore[untyped-decorator]
def of_keys(  # type: ignore[no-untyped-def]
    q, k, v, slopes, dk, dv, sums, deltas, bounds,
    q_step, q_head, k_step, k_head, v_step, v_head, slope_step, slope_head, tokens, key_heads, count, scale, factor,
    steps: tl.constexpr, groups: tl.constexpr, together: tl.constexpr, window: tl.constexpr,
    rows: tl.constexpr, keys: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = rows // together
    begin = tl.program_id(0) // key_heads * keys
    key_head = tl.program_id(0) % key_heads
    places = begin + tl.arange(0, keys)
    inside = places < tokens
    elements = tl.arange(0, size)
    long = places.to(tl.int64)
    head = key_head.to(tl.int64)
    key = tl.load(k + (long * k_step + head * k_head)[:, None] + elements[None, :], mask=inside[:, None], other=0.0)
    value = tl.load(v + (long * v_step + head * v_head)[:, None] + elements[None, :], mask=inside[:, None], other=0.0)
    last = tl.minimum(begin + keys, tokens) - 1
    # Queries that see a key come before `latest`.
    latest = tl.load(bounds + 1 + _document(bounds, tl.minimum(places, tokens - 1), steps, count))
    end = tl.load(bounds + 1 + _document(bounds, last, steps, count))
    whole = tl.load(bounds + 1 + _document(bounds, begin, steps, count))
    if window is not None:
        latest = tl.minimum(latest, places + window)
        end = tl.minimum(end, last + window)
        whole = tl.minimum(whole, begin + window)
    # Queries from the first key on; those between `unmasked` and `edge` see all keys.
    unmasked = tl.minimum(begin + (last - begin + width - 1) // width * width, end)
    edge = unmasked + tl.maximum(whole - unmasked, 0) // width * width
    of_key = tl.zeros((keys, size), tl.float32)
    of_value = tl.zeros((keys, size), tl.float32)
    for group in range(0, groups, together):
        first_head = key_head * groups + group
        of_key, of_value = _key_gradient(
            of_key, of_value, key, value, q, slopes, sums, deltas, q_step, q_head, slope_step, slope_head, first_head,
            begin, unmasked, places, latest, tokens, scale, together, rows, size, True,
        )  # fmt: skip
        of_key, of_value = _key_gradient(
            of_key, of_value, key, value, q, slopes, sums, deltas, q_step, q_head, slope_step, slope_head, first_head,
            unmasked, edge, places, latest, tokens, scale, together, rows, size, False,
        )  # fmt: skip
        of_key, of_value = _key_gradient(
            of_key, of_value, key, value, q, slopes, sums, deltas, q_step, q_head, slope_step, slope_head, first_head,
            edge, end, places, latest, tokens, scale, together, rows, size, True,
        )  # fmt: skip
    target = ((long * key_heads + head) * size)[:, None] + elements[None, :]
    tl.store(dk + target, of_key * factor, mask=inside[:, None])
    tl.store(dv + target, of_value, mask=inside[:, None])
