"""The command line's side of a sweep: progress on stderr, the comparison on stdout, the page into a folder."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from streamcl.config import ConfigError
from streamcl.console import out
from streamcl.sweep.course import run
from streamcl.sweep.results import Results
from streamcl.sweep.tables import signed, table

WIDEST = 200  # of a table in a file


def sweep(
    path: Path,
    base: Path | None,
    inputs: Mapping[str, str],
    order: str | None,
    folder: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Run, print, write `report.html` and `results.json`, and leave with the results' exit code."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--sweep: its report needs matplotlib: pip install 'streamcl[sweep]'")
    folder = folder or Path(f"{path.stem}-out")
    with View() as view, _terminated():
        results = run(path, base, inputs=inputs, order=order, out=folder, jobs=jobs, watcher=view)
    written = write(results, folder)
    if as_json:
        out(results.to_json() | {"report": str(written)})
    else:
        _print(results, written)
    raise typer.Exit(results.exit_code)


def write(results: Results, folder: Path) -> Path:
    """The page's path."""
    from streamcl.sweep.report import write_report  # Matplotlib takes a second

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_bytes(orjson.dumps(results.to_json(), option=orjson.OPT_INDENT_2))
    return write_report(folder / "report.html", results)


def _print(results: Results, written: Path) -> None:
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=WIDEST)
    console.print(table(results))
    for row in results.rows:
        if row.failure:
            console.print(f"{row.name}: {row.failure}", markup=False, highlight=False, style="red")
    if results.rest and results.rest.difference:
        gap, figure = results.rest.difference, results.objective
        ours, theirs = results.rest.figures.get(figure), results.rest.base.get(figure)
        console.print(
            f"chosen on the first {results.chosen_on:,} events: {results.chosen}; on the rest {figure} {ours:.4f}, the"
            f" base's {theirs:.4f}; loss less the base's {signed(gap.mean)} ({signed(gap.low)} to {signed(gap.high)},"
            f" p {gap.p:.2g})",
            markup=False, highlight=False,
        )  # fmt: skip
    for note in results.notes():
        console.print(f"· {note}", markup=False, highlight=False)
    console.print(f"{results.seconds:.1f} s; {written}", markup=False, highlight=False)


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class View:
    """A bar for the round, and one for each run under way."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._all: TaskID | None = None
        self._runs: dict[str, TaskID] = {}
        self._at: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> View:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def round(self, text: str, events: Mapping[str, tuple[int, int]]) -> None:
        if self._all is not None:
            self._progress.remove_task(self._all)
        self._at = dict(events)
        self._all = self._progress.add_task(text, total=sum(end - start for start, end in events.values()))
        if not self._progress.console.is_terminal:
            self._progress.console.print(text, markup=False, highlight=False)

    def told(self, name: str, events: int) -> None:
        start, end = self._at[name]
        if name not in self._runs:
            self._runs[name] = self._progress.add_task(name, total=end, completed=start)
        if self._all is not None:
            self._progress.advance(self._all, events - start)
        self._at[name] = events, end
        self._progress.update(self._runs[name], completed=events)

    def ended(self, name: str, failure: str | None) -> None:
        if name in self._runs:
            self._progress.remove_task(self._runs.pop(name))
        self._progress.console.print(
            f"{'failed' if failure else 'done'}: {name}", markup=False, highlight=False, style="red" if failure else ""
        )
