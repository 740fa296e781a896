"""The status page and its numbers over real HTTP; tests/kafka/test_status_page.py has what a browser makes of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamcl import __version__, status
from streamcl.config import Config
from streamcl.history import COLUMNS
from streamcl.readings import Reported
from streamcl.records import Stream
from streamcl.status import CARDS, Status
from streamcl.telemetry import Telemetry
from tests.test_telemetry import EVENTS_0, free_port, settings, turn

READINGS = {
    "lag_s": 2.0,
    "log_loss_window": 0.45,
    "ne_window": 0.9,
    "layer_0_dormant_ratio": 0.25,
    "join_hit_ratio": 0.5,
}


def sharded(port: int) -> Config:
    data = settings(port).model_dump(mode="json", exclude_unset=True)
    return Config.parse(data | {"shard": {"count": 3, "indices": [0, 2]}})


@pytest.fixture
def watching() -> Iterator[tuple[Telemetry, httpx.Client]]:
    with closing(Telemetry(settings(free_port()))) as watcher:
        url = watcher.start()
        assert url is not None
        with httpx.Client(base_url=url) as client:
            yield watcher, client


def tell(watcher: Telemetry, *shards: int, lag: int = 5) -> None:
    """What the loop does, and what the sampler does every two seconds."""
    for shard in shards:
        watcher.restored(0, "none", shard)
        watcher.observe(turn(), seconds=0.02, lag={EVENTS_0: lag}, readings=READINGS, shard=shard)
    watcher.status.history.sample(watcher.status.history.now(), watcher.status.told)


def test_a_program_gets_what_the_page_shows(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    tell(watcher, 0)
    watcher.checkpointed(0.1, 2_000_000)
    watcher.ready(True)
    told = client.get("/v1/status").json()
    assert (told["name"], told["version"], told["shards"], told["records"]) == ("shop", __version__, [0], 4)
    assert told["live"] == told["ready"] == {"ok": True, "reason": ""}
    assert told["position"] == {"events": {"0": 11}}
    assert told["dead_letters"] == {"undecodable": 1}
    assert told["drift_alarms"] == len(told["drift_times"]) == 1
    assert told["checkpoint"]["bytes"] == 2_000_000
    assert 0 <= told["checkpoint"]["age_s"] < 60
    assert told["series"].keys() == {"time", *COLUMNS}
    assert (told["series"]["loss"][-1], told["series"]["dormant"][-1]) == (0.45, 0.25)
    assert told["series"]["auc"][-1] is None
    texts = {each["name"]: each["text"] for each in told["figures"]}
    assert texts["loss"] == "0.4500"
    assert texts["dormant"] == "25.0%"
    assert texts["position"] == "events-0: 11"
    assert "auc" not in texts
    assert CARDS.keys() <= texts.keys() | {"events_per_s"}


def test_only_what_is_new_is_told_again(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    tell(watcher, 0)
    times = client.get("/v1/status").json()["series"]["time"]
    tell(watcher, 0)
    news = client.get("/v1/status", params={"since": times[-1]}).json()["series"]
    assert all(at > times[-1] for at in news["time"])
    assert 1 <= len(news["time"]) == len(news["loss"])


def test_one_shard_may_be_asked_for_and_all_are_the_sum() -> None:
    watcher = Telemetry(sharded(0))
    tell(watcher, 0, 2)
    watcher.status.history.observe(2, turn(records=6))
    both, second = watcher.status.describe(), watcher.status.describe(shard=2)
    assert (both["shards"], both["records"], both["dead_letters"]) == ([0, 2], 14, {"undecodable": 3})
    assert (second["shards"], second["records"], second["dead_letters"]) == ([0, 2], 10, {"undecodable": 2})
    assert (both["series"]["lag_records"][-1], second["series"]["lag_records"][-1]) == (10, 5)
    titles = {each["name"]: each["title"] for each in both["figures"]}
    assert (titles["loss"], titles["lag_s"]) == ("Log-loss, recent window (mean of shards)", "Behind by (worst shard)")
    assert watcher.status.describe(shard=1)["records"] == 0


def test_a_shard_that_left_is_gone_from_the_page() -> None:
    watcher = Telemetry(sharded(0))
    tell(watcher, 0, 2)
    watcher.left(2)
    assert watcher.status.describe()["shards"] == [0]
    assert watcher.status.describe()["records"] == 4


@pytest.mark.parametrize(
    ("unready", "dead", "expected"),
    [
        ("", "", ("ok", "Live and ready")),
        ("restoring", "", ("unready", "Not ready: restoring")),
        ("restoring", "still", ("dead", "Stalled: still")),
    ],
)
def test_health_is_told_in_words(unready: str, dead: str, expected: tuple[str, str]) -> None:
    page = Status(settings(0), "", {}, lambda: unready, lambda: dead)
    assert status.health_of(page.describe()) == expected


class Found(HTMLParser):
    """Tags, with the texts and addresses in them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_without_scripts_the_page_is_a_table_that_reloads_itself(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    tell(watcher, 0)
    answer = client.get("/")
    page = Found(answer.text)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert page.tags.count("noscript") == 1
    assert page.texts[page.texts.index("Log-loss, recent window") + 1] == "0.4500"
    assert page.texts.count("Not ready: starting") == 1
    assert {"header", "main", "footer", "h1", "h2", "table", "th"} <= set(page.tags)


def test_the_page_names_nothing_but_itself(watching: tuple[Telemetry, httpx.Client]) -> None:
    client = watching[1]
    answer = client.get("/")
    addresses = [address for address in Found(answer.text).addresses if not address.startswith("#")]
    assert addresses
    assert not any(
        "//" in address or address.startswith("/") for address in addresses
    )  # so a proxy's prefix does no harm
    assert client.get("assets/status.js").headers["content-type"].startswith("text/javascript")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy


def test_what_has_not_changed_is_not_sent_again(watching: tuple[Telemetry, httpx.Client]) -> None:
    client = watching[1]
    first = client.get("/assets/status.css")
    again = client.get("/assets/status.css", headers={"if-none-match": first.headers["etag"]})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
    assert first.headers["content-encoding"] == "gzip"


@pytest.mark.parametrize(
    "path", ["/assets/../index.html", "/assets/%2e%2e/package.json", "/charts/../package.json", "/x"]
)
def test_nothing_else_is_handed_out(watching: tuple[Telemetry, httpx.Client], path: str) -> None:
    assert watching[1].get(path).status_code == 404


@pytest.mark.parametrize("asked", ["shard=x", "since=x", "shard=1.5"])
def test_a_question_that_makes_no_sense_is_answered_with_why(
    watching: tuple[Telemetry, httpx.Client], asked: str
) -> None:
    answer = watching[1].get(f"/v1/status?{asked}")
    assert answer.status_code == 400
    assert answer.json()["error"]["reason"] == "query"


def test_names_and_reasons_are_shown_as_text_whatever_they_hold() -> None:
    attack = "<script>alert(1)</script>"
    config = settings(0).model_copy(update={"name": attack})
    told = Reported()
    told.position = {Stream(attack, 0): 3}
    page = Status(config, attack, {0: told}, lambda: attack, lambda: "").html()
    assert attack not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5  # title, heading, role, reason, position


def test_the_page_can_be_switched_off_and_health_stays() -> None:
    config = settings(port := free_port())
    place = config.telemetry.model_copy(update={"page": False})
    with closing(Telemetry(config.model_copy(update={"telemetry": place}))) as watcher:
        watcher.start()
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/v1/status").status_code == 404
        assert httpx.get(f"{url}/livez").status_code == 200


def test_without_charts_the_page_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(status, "CHARTS", tmp_path / "none")
    page = Status(settings(0), "", {}, str, str).html()
    assert "npm ci" in page
    assert "uPlot" not in page


def test_the_charts_are_those_of_the_lock_file() -> None:
    wanted: Any = json.loads((status.WEB / "package.json").read_text())["dependencies"]
    locked: Any = json.loads((status.WEB / "package-lock.json").read_text())["packages"]
    assert {f"node_modules/{name}": version for name, version in wanted.items()} == {
        name: each["version"] for name, each in locked.items() if name
    }
    assert all(each["integrity"].startswith("sha512-") for name, each in locked.items() if name)


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_what_is_read_stands_out_from_what_is_behind_it(scheme: int) -> None:
    """WCAG 2.2, AA: 4.5 : 1 for text, 3 : 1 for lines and the mark of the focus."""
    style = (status.WEB / "assets" / "status.css").read_text()
    colours = dict(re.findall(r"--(\S+): (#\w+);", re.findall(r":root \{.*?\}", style, re.DOTALL)[scheme]))
    pairs = [(text, behind, 4.5) for text in ("ink", "soft", "model") for behind in ("page", "sheet")]
    pairs += [(text, f"{text}-page", 4.5) for text in ("ok", "bad", "wait")]
    pairs += [(line, "sheet", 3.0) for line in ("model", "frozen", "other", "live", "constant", "drift", "focus")]
    for text, behind, least in pairs:
        lighter, darker = sorted((luminance(colours[text]), luminance(colours[behind])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= least, (text, behind)


def test_samples_are_taken_beside_the_loop(watching: tuple[Telemetry, httpx.Client]) -> None:
    """Nobody calls `sample` here but the server."""
    client = watching[1]
    deadline = time.monotonic() + 30
    while not client.get("/v1/status").json()["series"]["time"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
