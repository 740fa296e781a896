from typing import Any

import pytest

from streamcl.config import Config, ConfigError
from streamcl.features import Featurizer


def config(task: str = "binary", **features: Any) -> Config:
    base = {"user": "categorical", "item": {"kind": "categorical", "buckets": 9}, "tags": "bag", "price": "numeric"}
    events = {"url": "memory://a/b", "label": "y"}
    return Config.parse({"name": "t", "task": task, "events": events, "features": {**base, **features}})


UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("binary", {"kind": "cross", "of": ["user", "price"]}, "features.x.of: 'price'"),
    ("binary", {"kind": "cross", "of": ["user", "nobody"]}, "features.x.of: 'nobody'"),
    ("binary", {"kind": "cross", "of": ["user", "user"]}, "features.x.of: each once"),
    ("binary", {"kind": "cross", "of": ["user"]}, "features.x.of"),
    ("binary", {"kind": "history", "of": "tags", "by": "user"}, "features.x.of: 'tags'"),
    ("binary", {"kind": "history", "of": "item", "by": "tags"}, "features.x.by: 'tags'"),
    ("regression", {"kind": "history", "of": "item", "by": "user", "when": "positive"}, "features.x.when"),
    ("multiclass", {"kind": "rate", "of": "item"}, "features.x: no label rate of a multiclass task"),
    ("regression", {"kind": "rate", "of": "item", "form": "logit"}, "features.x: no label rate"),
    ("binary", {"kind": "rate", "of": "item", "half_life_s": 1.0, "half_life_events": 1.0}, "half_life_s"),
    ("binary", {"kind": "count", "of": "price"}, "features.x.of: 'price'"),
    ("binary", {"kind": "elapsed", "by": "tags"}, "features.x.by: 'tags'"),
    ("regression", {"kind": "covisits", "of": "item", "beside": "tags"}, "features.x: covisits are of binary labels"),
    ("binary", {"kind": "covisits", "of": "tags", "beside": "item"}, "features.x: 'tags' must be a categorical"),
    ("binary", {"kind": "covisits", "of": "item", "beside": "tags"}, "features.x.beside: 'tags' and 'item' need"),
]


@pytest.mark.parametrize(("task", "feature", "named"), UNFIT)
def test_what_does_not_fit_together_is_refused_by_its_path(task: str, feature: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("[", r"\[")):
        config(task, x=feature)


def test_a_history_shares_the_rows_of_the_field_it_lists_unless_it_has_its_own() -> None:
    shared = {"kind": "history", "of": "item", "by": "user", "last": 3}
    plain, with_it, apart = (
        Featurizer(made) for made in (config(), config(a=shared), config(a={**shared, "rows": "own"}))
    )
    assert with_it.layout.rows == plain.layout.rows
    assert with_it.fields["a"].base == with_it.fields["item"].base
    assert apart.layout.rows == plain.layout.rows + 10
    assert (apart.layout.slot_base[:3] == apart.fields["a"].base).all()
    assert apart.fields["a"].base != apart.fields["item"].base


def test_what_is_binned_is_a_number_and_a_row() -> None:
    layout = Featurizer(config(price={"kind": "numeric", "bins": 4})).layout
    assert "price" in layout.fields
    assert "price" in layout.numerics


def test_a_point_on_a_circle_is_two_numbers_that_nothing_scales() -> None:
    layout = Featurizer(config(t={"kind": "time", "cyclic": True})).layout
    assert dict(zip(layout.numerics, layout.unscaled.tolist(), strict=True)) == {
        "price": False,
        "t.cos": True,
        "t.sin": True,
    }
