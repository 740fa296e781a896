"""River's own checks of an estimator, each a test of its own, on the default settings, none skipped."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from river import base, checks

from streamcl.river_api import StreamClassifier, StreamRegressor

MODELS = {
    "multiclass": StreamClassifier(),
    "binary": StreamClassifier(multiclass=False),
    "regression": StreamRegressor(),
}


def found() -> Iterator[Any]:
    # River imports scikit-learn before it knows whether it needs one of its datasets; for these models it needs none.
    stand_in = {name: ModuleType(name) for name in ("sklearn", "sklearn.datasets")}
    stand_in["sklearn"].datasets = stand_in["sklearn.datasets"]  # type: ignore[attr-defined]
    with patch.dict(sys.modules, stand_in):
        for name, model in MODELS.items():
            for i, check in enumerate(checks.yield_checks(model)):
                yield pytest.param(model, check, id=f"{name}-{i}-{check.__name__}")


@pytest.mark.parametrize(("model", "check"), list(found()))
def test_every_check_of_river_holds(model: base.Estimator, check: Callable[[base.Estimator], None]) -> None:
    check(model.clone())


def test_no_check_is_skipped() -> None:
    for model in MODELS.values():
        assert model._unit_test_skips() == set()
        assert model._tags == set()
