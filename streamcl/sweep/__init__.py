"""`streamcl replay --sweep sweep.toml`: many configurations over one log, compared on the same events.

    from streamcl.sweep import run
    results = run("sweep.toml", out="sweep-out")
    results.chosen, results.row(results.chosen).figures["ne"]

- `course`: START HERE: rounds, from the first to the results
- `space`: `sweep.toml`, and the configurations that it stands for
- `log`: where the log ends, and how it is followed to a cut
- `trial`: one configuration up to the next cut, and what is kept of it
- `pool`: processes side by side
- `halving`: who goes on
- `answers`: what a run said, and how good that was
- `significance`: whether a difference is more than chance
- `results`, `report`: the comparison, as rows, as JSON, as a page
- `view`: what the command shows while it runs
"""

from streamcl.sweep.course import run
from streamcl.sweep.results import Results
from streamcl.sweep.space import Sweep

__all__ = ["Results", "Sweep", "run"]
