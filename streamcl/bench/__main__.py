"""`python -m streamcl.bench NAME ...`: the same as `streamcl bench NAME ...`."""

from __future__ import annotations

from streamcl.bench.command import app

if __name__ == "__main__":
    app(prog_name="streamcl bench")
