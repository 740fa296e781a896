"""Python's collector of cyclic garbage, kept from stopping a process that makes next to none."""

from __future__ import annotations

import gc

EVERY = 50_000
"""Objects made, and not freed by their count, between two looks at the youngest; Python's own is 700 to 2,000."""


def spare() -> None:
    """Look no more through what is here now, and seldom through the rest.

    To look through the 300,000 objects of the libraries takes 0.1 s, in which nobody is answered; events, tickets and
    outcomes hold no cycles, and a quarter of a worker's time went into finding that out.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(EVERY, 20, 20)
