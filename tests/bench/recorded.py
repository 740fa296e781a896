"""Where the recorded streams are, for the tests that need them."""

import os
from pathlib import Path

import pytest

from streamcl.bench.streams import ELEC, ML_100K

DATA = Path(os.environ.get("STREAMCL_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")

needs_recorded = pytest.mark.skipif(
    not all((DATA / path).is_file() for path in (ELEC, ML_100K)),
    reason="no recorded streams: set STREAMCL_DATA to the folder that holds ml-100k and elec.csv.gz",
)
