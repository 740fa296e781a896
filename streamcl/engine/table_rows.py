"""Dynamic tables, compiled: which id has which row, who is admitted, and whose row goes. See `tables` for the rules.

Both engines call this, so that they agree to the bit. Work of an event is in proportion to its slots: an open-addressed
index, a list of rows by when they were last learned from, a counting filter, and a hand that goes round a table.

Shape: T tables, D rows of all of them, S slots. A row of a table is counted from the first of all of them; in the
engine's table it lies `first` behind.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from streamcl.compiled import entry, exact
from streamcl.engine.kernels import ADAGRAD_KIND, FTRL_KIND, put
from streamcl.engine.optimizers import FTRL, Adagrad
from streamcl.index import NONE, enter, find, leave

AT_ONCE, COUNTED, BY_CHANCE = range(3)
ADMITTED, BY_TTL, BY_LRU, FORGOTTEN, REFUSED, ASKED, FOUND, OOV = range(8)
"""What is counted, of each table: rows by what has become of them, ids that found it full; and of the ids of learned
events all, those that had a row, and those that added nothing.
"""
NUMBERS = 8

GOLDEN, MIX1, MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_BETA, _INITIAL = FTRL.BETA, Adagrad.INITIAL
_MOST = 255  # that a cell counts


class Tables(NamedTuple):
    """Rules of each table (T,), what is in it, and room for what an event is about to change."""

    slot_table: Any  # (S,) -1: hashed
    void: int  # the row that reads as zero
    first: int
    # rules
    base: Any  # its first row
    room: Any  # rows that it may ever use: the cap, and as many as one event may admit
    cap: Any
    admission: Any
    threshold: Any
    chance: Any
    ttl: Any
    sweep: Any
    min_keep: Any
    ratio: Any
    refuses: Any
    draws: Any  # uint64 keys of first vectors
    lots: Any  # uint64 keys of admissions by chance
    # the filter
    filter_at: Any  # where its cells begin
    width: Any  # cells of a generation
    hashes: Any
    generations: Any  # one of them is being emptied
    span: Any  # occurrences of a generation
    turn: Any  # the one that counts now
    filled: Any  # occurrences in it
    counts: Any  # uint8 (all cells,): generations of one place side by side
    # rows
    keys: Any  # (D,) 0: free
    count: Any  # (D,) events learned
    first_seen: Any  # (D,)
    last_seen: Any  # (D,)
    newer: Any  # (D,)
    older: Any  # (D,)
    free: Any  # (D,) of each table, from its base on, rows that are free again, the last one first
    cells: Any  # (power of two,) 1 + row of an id; 0: none
    newest: Any
    oldest: Any
    used: Any
    high: Any  # rows ever used
    freed: Any
    hand: Any
    quota: Any  # rows that the present sweep may still take
    clock: Any  # (1,) the latest event time learned
    events: Any  # (1,) learned
    told: Any  # (T, NUMBERS)
    # of an event that is being learned
    before: Any  # (T, NUMBERS) what was told before it
    made: Any  # (S, 3): new row or NONE, old row or NONE, whether the new one was never used
    # how a row begins
    optimizer: int
    first_order: int
    scale: float
    rates: Any  # (3,)


@exact
def _mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


@exact
def _unit(key: Any, index: Any) -> float:
    """Element `index` of `random.uniform_array(key)`, `key` mixed."""
    z = _mix(key + np.uint64(index + 1) * GOLDEN)
    return (float(z >> np.uint64(12)) + 0.5) * 2.0**-52


@exact
def _place(key: Any, index: int, width: int) -> Any:
    """Of the index-th hash of an id among `width` cells: double hashing."""
    step = _mix(np.uint64(key)) | np.uint64(1)
    return np.int64((_mix(np.uint64(key) + np.uint64(index) * step) >> np.uint64(1)) % np.uint64(width))


@exact
def seen_before(key: Any, t: int, tables: Any) -> int:
    """How often an id has come to table t without getting a row, at least, as far back as its filter remembers."""
    counts, at, width, n = tables.counts, tables.filter_at[t], tables.width[t], tables.generations[t]
    emptied, total = (tables.turn[t] + 1) % n, 0
    for g in range(n):
        least: Any = _MOST
        for i in range(tables.hashes[t]):
            least = min(least, np.int64(counts[at + _place(key, i, width) * n + g]))
        if g != emptied:
            total += least
    return total


@exact
def _note(key: Any, t: int, tables: Any) -> None:
    """An occurrence without a row: of its cells only the lowest go up (Estan & Varghese 2002)."""
    counts, at, width, n = tables.counts, tables.filter_at[t], tables.width[t], tables.generations[t]
    turn, span, hashes = tables.turn[t], tables.span[t], tables.hashes[t]
    least: Any = _MOST
    for i in range(hashes):
        least = min(least, np.int64(counts[at + _place(key, i, width) * n + turn]))
    if least < _MOST:
        for i in range(hashes):
            cell = at + _place(key, i, width) * n + turn
            if counts[cell] == least:
                counts[cell] = least + 1
    # The generation that comes next is emptied bit by bit, and is empty when its time has come.
    emptied, filled = (turn + 1) % n, tables.filled[t]
    for cell in range(width * filled // span, width * (filled + 1) // span):
        counts[at + cell * n + emptied] = 0
    tables.filled[t] = filled + 1
    if filled + 1 == span:
        tables.filled[t], tables.turn[t] = 0, emptied


@exact
def _earns(key: Any, t: int, tables: Any) -> Any:
    """Whether an id without a row gets one at this occurrence."""
    rule = tables.admission[t]
    if rule == AT_ONCE:
        return True
    if rule == BY_CHANCE:
        lot = _mix(tables.lots[t] + np.uint64(tables.events[0]) * GOLDEN) ^ np.uint64(key)
        return _unit(_mix(lot), 0) < tables.chance[t]
    return seen_before(key, t, tables) + 1 >= tables.threshold[t]


@exact
def begin(row: int, t: int, tables: Any, table: Any, a: Any) -> None:
    """An id begins with `random.normal_array(random.bits(draws, id))`, scaled, and with the slots of that.

    So with what (seed, table, id) say, whenever it comes.
    """
    at, width, n = tables.first + row, table.shape[1], tables.first_order
    key = _mix(_mix(_mix(tables.draws[t] + np.uint64(tables.keys[row]) * GOLDEN) + GOLDEN))
    rates, one = tables.rates, table.dtype.type(1)
    for j in range(n, width):
        radius = math.sqrt(-2.0 * math.log(_unit(key, 2 * (j - n))))
        table[at, j] = tables.scale * radius * math.cos(2.0 * math.pi * _unit(key, 2 * (j - n) + 1))
    for j in range(width):
        if tables.optimizer == ADAGRAD_KIND:
            a[at * width + j] = _INITIAL
        elif tables.optimizer == FTRL_KIND:
            value = table[at, j]
            away = one if value > 0.0 else -one if value < 0.0 else one - one
            a[at * width + j] = -value * (one * _BETA / rates[0] + rates[2]) - rates[1] * away


@exact
def _wipe(row: int, tables: Any, table: Any, a: Any, b: Any, c: Any) -> None:
    """Nothing stays of a row; c has one number of it or as many as it has weights, as Adam's steps."""
    at, width = tables.first + row, table.shape[1]
    steps = len(c) // max(len(table), 1)
    for j in range(width):
        table[at, j] = 0.0
        if len(a):
            a[at * width + j] = 0.0
        if len(b):
            b[at * width + j] = 0.0
    for j in range(at * steps, (at + 1) * steps):
        c[j] = 0.0
    tables.keys[row] = 0
    tables.count[row] = 0
    tables.first_seen[row] = 0.0
    tables.last_seen[row] = 0.0


@exact
def unlink(row: int, t: int, tables: Any) -> None:
    newer, older = tables.newer[row], tables.older[row]
    if newer == NONE:
        tables.newest[t] = older
    else:
        tables.older[newer] = older
    if older == NONE:
        tables.oldest[t] = newer
    else:
        tables.newer[older] = newer
    tables.newer[row] = tables.older[row] = NONE


@exact
def link(row: int, t: int, tables: Any) -> None:
    head = tables.newest[t]
    tables.older[row], tables.newer[row], tables.newest[t] = head, NONE, row
    if head == NONE:
        tables.oldest[t] = row
    else:
        tables.newer[head] = row


@exact
def _release(row: int, t: int, tables: Any) -> None:
    tables.free[tables.base[t] + tables.freed[t]] = row
    tables.freed[t] += 1


@exact
def admit(ids: Any, weights: Any, time_s: float, tables: Any, table: Any, a: Any) -> int:
    """Give rows to the ids of an event that earn one now; how many rows that concerns.

    What it does is undone by `retract`, or completed by `complete`.
    """
    now, made = max(tables.clock[0], time_s), 0
    for each in range(len(tables.told)):
        put(tables.before[each], tables.told[each])
    for slot in range(len(ids)):
        key, t = ids[slot], tables.slot_table[slot]
        if t < 0 or key >= 0 or weights[slot] == 0.0:
            continue
        row = find(key, tables.keys, tables.cells)
        if row >= 0 and (now - tables.last_seen[row] <= tables.ttl[t] or tables.used[t] <= tables.min_keep[t]):
            continue
        new, unused = NONE, 0
        if row >= 0:
            leave(row, tables.keys, tables.cells)
            tables.used[t] -= 1
        if _earns(key, t, tables):
            if tables.refuses[t] and tables.used[t] >= tables.cap[t]:
                tables.told[t, REFUSED] += 1
            elif tables.freed[t] > 0:
                tables.freed[t] -= 1
                new = tables.free[tables.base[t] + tables.freed[t]]
            else:
                new, unused = tables.base[t] + tables.high[t], 1
                tables.high[t] += 1
        if new >= 0:
            tables.keys[new], tables.first_seen[new], tables.last_seen[new] = key, now, now
            enter(new, tables.keys, tables.cells)
            tables.used[t] += 1
            begin(new, t, tables, table, a)
        if new >= 0 or row >= 0:
            tables.made[made, 0], tables.made[made, 1], tables.made[made, 2] = new, row, unused
            made += 1
    return made


@exact
def table_of(row: int, tables: Any) -> int:
    t = 0
    while row >= tables.base[t] + tables.room[t]:
        t += 1
    return t


@exact
def retract(made: int, tables: Any, table: Any, a: Any, b: Any, c: Any) -> None:
    """The event is not learned: as if `admit` had not been called."""
    for i in range(made - 1, -1, -1):
        new, old, unused = tables.made[i, 0], tables.made[i, 1], tables.made[i, 2]
        t = table_of(max(new, old), tables)
        if new >= 0:
            leave(new, tables.keys, tables.cells)
            tables.used[t] -= 1
            _wipe(new, tables, table, a, b, c)
            if unused:
                tables.high[t] -= 1
            else:
                tables.freed[t] += 1  # where it was taken from it still stands
        if old >= 0:
            enter(old, tables.keys, tables.cells)
            tables.used[t] += 1
    for each in range(len(tables.told)):
        put(tables.told[each], tables.before[each])


@exact
def evict(row: int, reason: int, tables: Any, table: Any, a: Any, b: Any, c: Any) -> Any:
    """A row goes, with all that belongs to it; where it was in the engine's table."""
    t = table_of(row, tables)
    leave(row, tables.keys, tables.cells)
    tables.used[t] -= 1
    unlink(row, t, tables)
    _wipe(row, tables, table, a, b, c)
    _release(row, t, tables)
    tables.told[t, reason] += 1
    return np.int64(tables.first + row)


@exact
def complete(
    made: int,
    ids: Any,
    weights: Any,
    time_s: float,
    tables: Any,
    table: Any,
    a: Any,
    b: Any,
    c: Any,
    moved: Any,
    n: int,
) -> int:
    """The event has been learned: it is counted, what is too much goes, and what is too old.

    Rows that came or went are noted in `moved` from n on, unless that is empty; returns where it ends.
    """
    now = tables.clock[0] = max(tables.clock[0], time_s)
    noting = len(moved) > 0
    for slot in range(len(ids)):
        key, t = ids[slot], tables.slot_table[slot]
        if t < 0 or key >= 0 or weights[slot] == 0.0:
            continue
        tables.told[t, ASKED] += 1
        row = find(key, tables.keys, tables.cells)
        if row < 0:
            tables.told[t, OOV] += 1
            if tables.admission[t] == COUNTED:
                _note(key, t, tables)
            continue
        if tables.count[row] > 0:
            tables.told[t, FOUND] += 1
            unlink(row, t, tables)
        tables.count[row] += 1
        tables.last_seen[row] = now
        link(row, t, tables)
    for i in range(made):
        new, old = tables.made[i, 0], tables.made[i, 1]
        t = table_of(max(new, old), tables)
        if old >= 0:  # it has left the index
            unlink(old, t, tables)
            _wipe(old, tables, table, a, b, c)
            _release(old, t, tables)
            tables.told[t, BY_TTL] += 1
        if new >= 0:
            tables.told[t, ADMITTED] += 1
        if noting and old >= 0:
            moved[n] = tables.first + old
            n += 1
        if noting and new >= 0:
            moved[n] = tables.first + new
            n += 1
    for t in range(len(tables.base)):
        while tables.used[t] > tables.cap[t]:
            gone = evict(tables.oldest[t], BY_LRU, tables, table, a, b, c)
            if noting:
                moved[n] = gone
                n += 1
        for _ in range(tables.sweep[t] if tables.ttl[t] < math.inf and tables.high[t] > 0 else 0):
            if tables.hand[t] >= tables.high[t]:
                tables.hand[t] = 0
            if tables.hand[t] == 0:
                tables.quota[t] = math.ceil(tables.ratio[t] * tables.used[t])
            row = tables.base[t] + tables.hand[t]
            tables.hand[t] += 1
            old = tables.keys[row] != 0 and now - tables.last_seen[row] > tables.ttl[t]
            if old and tables.used[t] > tables.min_keep[t] and tables.quota[t] > 0:
                tables.quota[t] -= 1
                gone = evict(row, BY_TTL, tables, table, a, b, c)
                if noting:
                    moved[n] = gone
                    n += 1
    tables.events[0] += 1
    return n


@entry
def place(ids: Any, weights: Any, tables: Tables, rows: Any, heavy: Any) -> None:
    """Rows of the engine's table and their weights, for ids and weights; all (n,). Without a row: `void`, weight 0."""
    for i in range(len(ids)):
        rows[i], heavy[i] = ids[i], weights[i]
        if ids[i] < 0:
            row = find(ids[i], tables.keys, tables.cells)
            rows[i] = tables.first + row if row >= 0 else tables.void
            heavy[i] = weights[i] if row >= 0 else 0.0


@entry
def admit_now(ids: Any, weights: Any, time_s: float, tables: Tables, table: Any, a: Any) -> int:
    return admit(ids, weights, time_s, tables, table, a)


@entry
def retract_now(made: int, tables: Tables, table: Any, a: Any, b: Any, c: Any) -> None:
    retract(made, tables, table, a, b, c)


@entry
def complete_now(
    made: int,
    ids: Any,
    weights: Any,
    time_s: float,
    tables: Tables,
    table: Any,
    a: Any,
    b: Any,
    c: Any,
    moved: Any,
) -> int:
    return complete(made, ids, weights, time_s, tables, table, a, b, c, moved, 0)


@entry
def evict_now(key: int, tables: Tables, table: Any, a: Any, b: Any, c: Any) -> int:
    """What is known of an id goes; where its row was in the engine's table, NONE where it had none."""
    row = find(key, tables.keys, tables.cells)
    return evict(row, FORGOTTEN, tables, table, a, b, c) if row >= 0 else NONE


@entry
def index(rows: Any, keys: Any, cells: Any) -> None:
    """Enter these rows, whose keys are known."""
    for row in rows:
        enter(row, keys, cells)


@entry
def unindex(rows: Any, keys: Any, cells: Any) -> None:
    for row in rows:
        leave(row, keys, cells)


def none(dtype: Any) -> Tables:
    """Where there is no dynamic table."""
    numbers: dict[str, Any] = {name: np.zeros(0, np.int64) for name in Tables._fields}
    numbers |= {name: np.zeros(0) for name in ("chance", "ttl", "ratio", "first_seen", "last_seen", "clock")}
    numbers |= {name: np.zeros(0, np.int32) for name in ("newer", "older", "free")}
    numbers |= {name: np.zeros(0, np.uint64) for name in ("draws", "lots")}
    numbers |= {"told": np.zeros((0, NUMBERS), np.int64), "before": np.zeros((0, NUMBERS), np.int64)}
    numbers |= {"made": np.zeros((0, 3), np.int64), "refuses": np.zeros(0, np.bool_), "counts": np.zeros(0, np.uint8)}
    numbers |= {"cells": np.zeros(1, np.int32), "rates": np.zeros(3, dtype), "scale": 1.0}
    return Tables(**numbers | {"void": NONE, "first": 0, "optimizer": 0, "first_order": 0})
