"""The status page of a real worker as headless Chromium shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamcl import connect
from streamcl.config import Config
from streamcl.demo.simulator import Settings, simulate
from streamcl.demo.stage import configure
from streamcl.demo.traffic import Traffic
from streamcl.records import Message
from streamcl.status import CHARTS
from streamcl.telemetry import Telemetry
from tests.components import lack
from tests.kafka.conftest import Cluster, toml
from tests.test_status import sharded, tell
from tests.test_telemetry import free_port

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

DRAWN = ("loss", "lag", "rate", "ne", "auc", "dormant", "joined", "letters")
BAD = (
    b"{",
    b"[1]",
    b'{"id": "x", "user": 1}',
    b'{"id": "y", "user": 1, "item": 1, "category": 1, "device": "tv", "placement": "home", "price": 1e400, "tags": [],'
    b' "time": 1767600000.0}',
)
INK = """
const canvas = document.querySelector(`#chart-${arguments[0]} canvas`);
if (!canvas) return 0;
const probe = document.createElement("canvas").getContext("2d");
probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${arguments[1]}`);
probe.fillRect(0, 0, 1, 1);
const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let found = 0;
for (let i = 0; i < data.length; i += 4) found += data[i] === r && data[i + 1] === g && data[i + 2] === b;
return found;
"""
"""How many pixels of a chart have exactly this colour of the page."""
FOCUS = """
const it = document.activeElement, seen = it.matches("[name=span]") ? it.nextElementSibling : it;
const name = it.id || it.closest("figure")?.id || it.name || it.getAttribute("href");
return [name, getComputedStyle(seen).outlineStyle !== "none", it.ariaLabel ?? it.textContent ?? ""];
"""


def until(claim: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def url(broker: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A worker that has learned simulated clicks with two drifts, and met what it could not use."""
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    world = Settings(events=8_000)
    data = json.loads(configure(broker.url, world, folder / "checkpoints").model_dump_json(exclude_unset=True))
    data |= {
        "name": broker.name(),
        "events": data["events"] | {"url": f"{broker.url}/{broker.topic()}"},
        "labels": data["labels"] | {"url": f"{broker.url}/{broker.topic()}"},
        "predictions": None,
        "telemetry": {"port": port},
        "metrics": {"window": 1_000},
        "plasticity": [{"kind": "continual_backprop"}],
        "diagnostics": {"sample_every_steps": 4, "window": 128},
        "error_memory": [{"kind": "key", "key": "user"}],
    }
    config = Config.parse(data)
    (folder / "config.toml").write_text(toml({key: value for key, value in data.items() if value is not None}))
    program = [sys.executable, "-m", "streamcl.cli", "run", str(folder / "config.toml")]
    with (folder / "said").open("w") as said:
        worker = subprocess.Popen(program, stdout=said, stderr=said)
    try:
        _feed(config, world)
        until(lambda: _complete(f"http://127.0.0.1:{port}", worker, folder / "said"), 240.0)
        yield f"http://127.0.0.1:{port}/"
    finally:
        worker.terminate()
        worker.wait(60)


def _feed(config: Config, world: Settings) -> None:
    traffic = Traffic(simulate(world), config, per_s=1e9, lead=10**9)
    traffic.run()
    traffic.close()
    assert traffic.error is None
    sink = connect.open_sink(config.events.url, config)
    sink.send([Message(value, b"k") for value in BAD])
    sink.flush()
    sink.close()


def _complete(url: str, worker: subprocess.Popen[bytes], said: Path) -> bool:
    """Every chart has something to show, over some seconds."""
    assert worker.poll() is None, said.read_text()
    try:
        told = httpx.get(f"{url}/v1/status").json()
    except httpx.TransportError:
        return False
    known = {name for name, values in told["series"].items() if sum(each is not None for each in values) > 3}
    return (
        bool(told["drift_alarms"]) and len(told["dead_letters"]) > 1 and {"auc", "dormant", "joined", "lag_s"} <= known
    )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Alone with this machine; it skips (or fails, see STREAMCL_REQUIRE) where it can't be had."""
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(programs) or not CHARTS.is_dir():
        reason = "chromium and chromedriver are not on PATH" if not all(programs) else "npm has not brought the charts"
        lack("browser", reason)
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic")
    for flag in ("headless=new", "no-sandbox", "no-first-run", *(f"disable-{each}" for each in quiet)):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: Any, url: str) -> Any:
    """The page, loaded anew and drawn, on a desktop, in the light."""
    look(chromium, 1280)
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    logs(chromium, "browser"), logs(chromium, "performance")
    chromium.get(url)
    until(lambda: bool(chromium.execute_script("return !!told")))
    return chromium


def logs(chromium: Any, kind: str) -> list[dict[str, Any]]:
    """What has come since they were asked for last."""
    return list(chromium.get_log(kind))


def look(chromium: Any, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (375, "light")])
def test_every_chart_is_drawn_in_the_colours_of_the_page(page: Any, width: int, scheme: str) -> None:
    look(page, width, scheme)
    until(lambda: all(page.execute_script(INK, name, "model") > 30 for name in DRAWN), 20.0)
    assert page.execute_script(INK, "loss", "drift") > 10
    assert page.execute_script(INK, "loss", "constant") > 10


def test_nothing_is_wrong_and_nothing_is_asked_of_anybody_else(page: Any, url: str) -> None:
    answers = page.execute_script("return told.time")
    until(lambda: page.execute_script("return told.time") > answers, 20.0)
    assert [entry for entry in logs(page, "browser") if entry["level"] != "INFO"] == []
    sent = [json.loads(entry["message"])["message"] for entry in logs(page, "performance")]
    asked = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    assert len(asked) >= 6  # the page, two scripts, two styles, the icon, numbers
    assert [address for address in asked if not address.startswith(url)] == []


def test_a_phone_shows_it_all_without_scrolling_sideways(page: Any) -> None:
    look(page, 375)
    until(lambda: page.execute_script("return document.querySelector('#chart-loss canvas').clientWidth") < 375, 20.0)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 375
    small = "return [...document.querySelectorAll('button, fieldset label')].filter(e => e.clientHeight < 36).length"
    assert page.execute_script(small) == 0


def press(page: Any, *keys: str) -> Any:
    """What has the focus then: its name, whether one sees that, and what it says."""
    webdriver.ActionChains(page).send_keys(*keys).perform()
    return page.execute_script(FOCUS)


def test_the_keyboard_reaches_everything_and_one_sees_where_it_is(page: Any) -> None:
    stops: list[Any] = []
    while not stops or stops[-1][0] != "livez":
        stops.append(press(page, Keys.TAB))
        assert len(stops) < 30
    expected = ["#figures", "span", "pause", *(f"chart-{name}" for name in DRAWN), "metrics", "v1/status", "readyz"]
    assert [name for name, _, _ in stops] == [*expected, "livez"]
    assert all(seen for _, seen, _ in stops)
    assert all(len(says) > 20 for name, _, says in stops if name.startswith("chart-"))  # role img, told in words


def test_arrow_keys_read_a_chart_and_change_the_span(page: Any) -> None:
    for _ in range(2):
        press(page, Keys.TAB)
    assert page.execute_script("return span()") == 900
    press(page, Keys.ARROW_RIGHT)
    assert page.execute_script("return span()") == 3600
    press(page, Keys.TAB), press(page, Keys.TAB)
    spoken = set()
    for _ in range(3):
        assert press(page, Keys.ARROW_LEFT)[0] == "chart-loss"
        spoken.add(page.execute_script("return document.getElementById('spoken').textContent"))
    assert len(spoken) == 3
    assert all("this model" in each for each in spoken)


def test_the_way_past_the_charts_leads_to_the_figures(page: Any) -> None:
    press(page, Keys.TAB)
    assert press(page, Keys.ENTER)[0] == "figures"


def test_it_goes_on_by_itself_and_leaves_the_reader_where_they_are(page: Any) -> None:
    page.execute_script("document.querySelector('footer a').focus(); scrollTo(0, 400)")
    before, told = page.execute_script("return [scrollY, told.time]")
    until(lambda: page.execute_script("return told.time") > told, 20.0)
    assert page.execute_script("return [scrollY, document.activeElement.textContent]") == [before, "metrics"]


def test_it_stands_still_when_told_to(page: Any) -> None:
    page.execute_script("document.getElementById('pause').click()")
    until(lambda: page.execute_script("return document.getElementById('pause').ariaPressed") == "true")
    told = page.execute_script("return told.time")
    time.sleep(3.0)
    assert page.execute_script("return told.time") == told
    page.execute_script("document.getElementById('pause').click()")
    until(lambda: page.execute_script("return told.time") > told, 20.0)


def test_a_worker_that_does_not_answer_is_not_shown_as_healthy(page: Any) -> None:
    health = "return document.getElementById('health').textContent"
    assert page.execute_script(health) == "Live and ready"
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **network})
    until(lambda: page.execute_script(health).startswith("No answer from the worker since"), 20.0)
    page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **network})
    until(lambda: page.execute_script(health) == "Live and ready", 20.0)


def test_without_scripts_there_are_figures(page: Any, url: str) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.get(url)
    text = page.find_element("tag name", "main").text
    assert "Live and ready" in page.find_element("id", "health").text
    assert "Log-loss, recent window" in text
    assert "Pause" not in text


def test_one_of_several_shards_can_be_chosen_and_stays_chosen(page: Any) -> None:
    with closing(Telemetry(sharded(free_port()))) as watcher:
        page.get(f"{watcher.start()}/")
        tell(watcher, 0, 2)  # after the page was loaded: the list of shards follows
        records = "return document.querySelector('#rows [data-figure=records]').textContent"
        until(lambda: page.execute_script(records) == "8", 20.0)
        page.find_element("css selector", "#shard option[value='2']").click()
        until(lambda: page.execute_script(records) == "4", 20.0)
        assert page.current_url.endswith("/?shard=2")
        page.refresh()
        until(lambda: bool(page.execute_script("return !!told")))
        assert page.execute_script(records) == "4"
        assert page.execute_script("return document.getElementById('shard').value") == "2"
