"""Small click streams of the shape of YOOCHOOSE."""

import gzip
from pathlib import Path

import numpy as np

from streamcl.bench.next_click_events import Clicks


def made(count: int, items: int = 400, seed: int = 0) -> Clicks:
    """Sessions that interleave; each walks mostly to the item two further on, small numbers being popular."""
    rng = np.random.default_rng(seed)
    at = np.zeros(20, np.int64)
    session = np.arange(1, 21)
    sessions, clicked = np.empty((2, count), np.int64)
    for n in range(count):
        who = int(rng.integers(20))
        if not at[who] or rng.random() < 0.2:  # a new session
            session[who] = session.max() + 1
            at[who] = 1 + int(items * rng.random() ** 2)
        else:
            at[who] = 1 + (at[who] + 1) % items if rng.random() < 0.8 else 1 + int(items * rng.random() ** 2)
        sessions[n], clicked[n] = session[who], at[who]
    return Clicks(sessions, clicked, [0, count // 2])


def write(clicks: Clicks, folder: Path) -> None:
    (folder / "yoochoose").mkdir()
    ends = [*clicks.starts[1:], len(clicks.items)]
    for period, (start, end) in enumerate(zip(clicks.starts, ends, strict=True)):
        rows = zip(clicks.sessions[start:end], clicks.items[start:end], strict=True)
        text = "\n".join(f"{session} {item}" for session, item in rows)
        (folder / f"yoochoose/period_{period}.txt.gz").write_bytes(gzip.compress(text.encode()))
