"""Two public click logs: Open Bandit's, which says how likely each item was to be shown, and Criteo-like rows."""

from __future__ import annotations

import csv
import gzip
import importlib.util
from datetime import datetime
from pathlib import Path
from typing import Any

from streamcl.bench.streams import LABEL, TIME, DataError, Dataset

OPEN_BANDIT = "obd/random_women.csv.gz"
CRITEO = ("criteo_like/part-0.orc", "criteo_like/part-1.orc")
LOGS = ("obd", "criteo")

PROPENSITY, WEIGHT = "propensity", "weight"
USER = tuple(f"user_{place}" for place in range(4))
ITEMS = 46
NUMBERS = tuple(f"i{place}" for place in range(1, 14))
IDS = tuple(f"c{place}" for place in range(1, 27))

SHOWN: dict[str, Any] = {
    **dict.fromkeys(("item", "position", *USER), "categorical"),
    "affinity": "numeric",
    "affinities": {"kind": "bag", "max_items": ITEMS, "pooling": "sum"},
}
NUMBERED: dict[str, Any] = {**dict.fromkeys(NUMBERS, "numeric"), **dict.fromkeys(IDS, "categorical")}
"""Features of the two."""


def log_rows(name: str, folder: Path | None) -> Dataset:
    """The log `name`. Raises DataError naming the file, or the package that reads it, where that is missing."""
    paths = (OPEN_BANDIT,) if name == "obd" else CRITEO
    if folder is None:
        raise DataError(f"stream {name} is recorded: --data DIR must name the folder that holds {paths[0]}")
    for path in paths:
        if not (folder / path).is_file():
            raise DataError(f"{folder / path}: no such file; --data DIR must name the folder that holds {path}")
    return open_bandit(folder / OPEN_BANDIT) if name == "obd" else criteo([folder / path for path in CRITEO])


def open_bandit(path: Path) -> Dataset:
    """Open Bandit's log: was the item clicked that a policy showed at one of three positions?

    `affinities` are those of the user to all items that are not 0, by item; `affinity` is that to the item shown.
    `propensity` is how likely the policy was to show that item there, `weight` 1 / (propensity x items): what the row
    counts under a policy that shows all items alike. Neither is a feature.

    Columns of the file, which is in time order: see Saito et al. 2020, arXiv 2008.07146, section 3.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {error}") from error
    return Dataset("obd", SHOWN, [_shown(row) for row in rows], weight=WEIGHT)


def _shown(row: dict[str, str]) -> dict[str, Any]:
    affinities = {str(item): float(row[f"user-item_affinity_{item}"]) for item in range(ITEMS)}
    propensity = float(row["propensity_score"])
    return {
        "item": row["item_id"],
        "position": row["position"],
        **{name: row[f"user_feature_{place}"] for place, name in enumerate(USER)},
        "affinity": affinities[row["item_id"]],
        "affinities": {item: value for item, value in affinities.items() if value},
        PROPENSITY: propensity,
        WEIGHT: 1.0 / (propensity * ITEMS),
        TIME: datetime.fromisoformat(row["timestamp"]).timestamp(),
        LABEL: int(row["click"]),
    }


def orc_installed() -> bool:
    return importlib.util.find_spec("pyarrow") is not None


def criteo(paths: list[Path]) -> Dataset:
    """Criteo-like rows in file order, for their times are unknown: a row is a second. What is missing is absent."""
    if not orc_installed():
        raise DataError(f"{paths[0]}: an ORC file needs pyarrow; install streamcl[bench]")
    from pyarrow import ArrowException, orc

    payloads: list[dict[str, Any]] = []
    for path in paths:
        try:
            columns = orc.read_table(path, columns=[*NUMBERS, *IDS, "label"]).to_pydict()
        except (OSError, ArrowException, KeyError) as error:
            raise DataError(f"{path}: {error}") from error
        for place, label in enumerate(columns["label"]):
            lists = {name: columns[name][place] for name in (*NUMBERS, *IDS)}  # one value in each, or none
            known = {name: one[0] for name, one in lists.items() if one}
            payloads.append({**known, TIME: float(len(payloads)), LABEL: int(label[0])})
    return Dataset("criteo", NUMBERED, payloads)
