"""Benchmarks: what is promised, measured beside its peers in the same run.

`options` what a bench may be asked · `report` the contract of its answer · `streams` what is streamed ·
`quality` how scores are judged · `drive` how the product is run · `clock` how long it took · `peers` how the others
are run · `peer_python` those that need a Python of their own · `brokers` what they meet on ·
then one module per bench, under its own name.
"""

from __future__ import annotations

from importlib import import_module

from streamcl.bench.options import Options
from streamcl.bench.report import Report, emit
from streamcl.protocols import StreamclError

BENCHES = {
    "stream": "streamcl.bench.stream",
    "retention": "streamcl.bench.retention",
    "journey": "streamcl.bench.journey",
    "recovery": "streamcl.bench.recovery",
    "worker": "streamcl.bench.worker",
    "serve": "streamcl.bench.serve",
    "error-memory": "streamcl.bench.error_memory",
    "plasticity": "streamcl.bench.plasticity",
    "continual": "streamcl.bench.continual",
    "step": "streamcl.bench.step",
    "scale": "streamcl.bench.scale",
    "distributed": "streamcl.bench.distributed",
}
"""Module by bench name. A module has `READS`, the options that it heeds, and `run(options) -> Report`."""


class UnknownBench(StreamclError):
    """No bench has this name."""


def run(name: str, options: Options) -> Report:
    """Measure. Raises StreamclError for an unknown name, an option that the bench would ignore, or missing data."""
    if name not in BENCHES:
        raise UnknownBench(f"no bench {name!r}; there are: {', '.join(BENCHES)}")
    module = import_module(BENCHES[name])
    options.require_read_by(name, module.READS)
    report: Report = module.run(options)
    return report


def main(name: str, options: Options) -> int:
    """Measure and print. Returns the exit code: 0 only if every bar is ok."""
    report = run(name, options)
    emit(report, as_json=options.json, plot=options.plot)
    return report.exit_code
