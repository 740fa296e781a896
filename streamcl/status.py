"""The status page: `/` for people without Grafana, `/v1/status` for the page and for programs, both without a key.

The page is drawn by the reader's browser; this side hands out numbers that are there already. It loads nothing from
elsewhere, shows no key, user or value of an event, and without scripts it is a table that reloads itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamcl import __version__
from streamcl.config import Config
from streamcl.history import INTERVAL_S, SAMPLES, Facts, History
from streamcl.readings import Reported

WEB = Path(__file__).parent / "web"
CHARTS = WEB / "node_modules" / "uplot"
"""What draws, as npm brings it: the build of a wheel does (`hatch_build.py`)."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asks again each time, and is told that nothing has changed
}

CARDS = {
    "loss": "Loss now",
    "events_per_s": "Records per second",
    "lag_records": "Records that wait",
    "lag_s": "Behind by",
    "checkpoint": "Last checkpoint",
    "dead_letters": "Dead letters",
}
"""Figures that come first, by name."""
DRAWING = '<link rel="stylesheet" href="charts/uPlot.min.css">\n<script src="charts/uPlot.iife.min.js" defer></script>'
MISSING = (
    '<p class="missing">This build has no charts: npm was not at hand when it was made. <code>npm ci</code> in'
    " <code>streamcl/web</code> of the sources brings them; a wheel that was built with npm has them.</p>"
)


class Status:
    """What is told of the shards of one process.

    Args:
        role: Of whom; see `Telemetry`.
        told: By shard; of the loop's thread.
        unready, dead: Why the process is not ready, or not live; "" when it is.
    """

    def __init__(
        self,
        config: Config,
        role: str,
        told: Mapping[int, Reported],
        unready: Callable[[], str],
        dead: Callable[[], str],
    ) -> None:
        self.config = config
        self.role = role
        self.told = told
        self.unready, self.dead = unready, dead
        self.history = History()

    def mount(self) -> Mount:
        """The pages, for what no other route answers."""
        routes = [Route("/", self._page), Route("/v1/status", self._status)]
        folders = {"/assets": WEB / "assets", "/charts": CHARTS / "dist"}
        files = [Mount(path, StaticFiles(directory=folder, check_dir=False)) for path, folder in folders.items()]
        around = [Middleware(Guarded), Middleware(GZipMiddleware, minimum_size=1024, compresslevel=5)]
        return Mount("/", routes=[*routes, *files], middleware=around)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Samples are taken in between."""
        sampling = asyncio.create_task(self._sample())
        yield
        sampling.cancel()

    async def _sample(self) -> None:
        while True:
            self.history.sample(self.history.now(), dict(self.told))
            await asyncio.sleep(INTERVAL_S)

    # On the loop of the samples, so that none is read that is half written.
    async def _status(self, request: Request) -> Response:
        try:
            shard = int(request.query_params["shard"]) if request.query_params.get("shard") else None
            since = float(request.query_params.get("since") or 0.0)
        except ValueError:
            text = {"error": {"reason": "query", "message": "shard is an index, since a time in seconds"}}
            return Response(orjson.dumps(text), 400, media_type="application/json")
        body = orjson.dumps(self.describe(shard, since), option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")

    async def _page(self, request: Request) -> Response:
        asked = request.query_params.get("shard", "")
        return HTMLResponse(self.html(int(asked) if asked.isdecimal() else None))

    def describe(self, shard: int | None = None, since: float = 0.0) -> dict[str, Any]:
        """JSON-ready. Of one shard, or of all of this process; `series` begins after `since`, and has null for unknown.

        Times are those of `History.now`; `figures` are the same numbers in words.
        """
        told, now = dict(self.told), self.history.now()
        chosen = [index for index in sorted(told) if shard in (None, index)]
        known = dict(self.history.facts)
        facts = {index: known.get(index, Facts()) for index in chosen}
        letters = sum((Counter(dict(each.dead_letters)) for each in facts.values()), Counter[str]())
        saves = [each.saved_at for each in facts.values() if each.saved_at is not None]
        made: dict[str, Any] = {
            "name": self.config.name,
            "role": self.role,
            "version": __version__,
            "time": now,
            "began": self.history.began,
            "live": {"ok": not (dead := self.dead()), "reason": dead},
            "ready": {"ok": not (unready := self.unready()), "reason": unready},
            "shard": shard,
            "shards": sorted(told),
            "shard_count": self.config.shard.count,
            "records": sum(each.records for each in facts.values()),
            "position": _position([told[index] for index in chosen]),
            "checkpoint": {
                "age_s": now - min(saves) if saves else None,
                "bytes": sum(each.saved_bytes for each in facts.values()),
            },
            "dead_letters": dict(letters.most_common()),
            "drift_alarms": sum(each.alarms for each in facts.values()),
            "drift_times": sorted(at for each in facts.values() for at in each.alarm_times.copy()),
            "interval_s": INTERVAL_S,
            "history_s": INTERVAL_S * SAMPLES,
            "charts": CHARTS.is_dir(),
            "series": {
                name: values if name == "time" else values.astype(np.float32)  # half as long as text
                for name, values in self.history.series(chosen, since).items()
            },
        }
        latest = {
            name: float(values[-1])
            for name, values in self.history.series(chosen, now - 3 * INTERVAL_S).items()
            if len(values)
        }
        made["figures"] = [
            {"name": name, "title": title, "text": text}
            for name, title, text in _figures(made, latest, self.config.task)
        ]
        return made

    def html(self, shard: int | None = None) -> str:
        """The page as it is without scripts; with them, it goes on from there."""
        told = self.describe(shard, math.inf)
        kind, words = health_of(told)
        texts = {each["name"]: (escape(each["title"]), escape(each["text"])) for each in told["figures"]}
        cells = {name: f'<td data-figure="{name}">{text}</td>' for name, (_, text) in texts.items()}
        rows = [f'<tr><th scope="row">{texts[name][0]}</th>{cell}</tr>' for name, cell in cells.items()]
        cards = [
            f'<div><dt>{title}</dt><dd data-figure="{name}">{texts.get(name, ("", UNKNOWN))[1]}</dd></div>'
            for name, title in CARDS.items()
        ]
        marks = {index: " selected" if index == shard else "" for index in told["shards"]}
        options = [f'<option value="{index}"{mark}>{index}</option>' for index, mark in marks.items()]
        return Template((WEB / "index.html").read_text(encoding="utf-8")).substitute(
            name=escape(told["name"]),
            role=escape(f"{self.role} · " if self.role else ""),
            version=escape(__version__),
            uptime=texts["uptime"][1],
            health=kind,
            reason=escape(words),
            cards="\n".join(cards),
            rows="\n".join(rows),
            options="".join(['<option value="">all</option>', *options]),
            alone="hidden" if self.config.shard.count == 1 else "",
            charts=DRAWING if told["charts"] else "",
            missing="" if told["charts"] else MISSING,
        )


class Guarded:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, sent)


def health_of(told: Mapping[str, Any]) -> tuple[str, str]:
    """(`ok`, `unready` or `dead`, the same in words)."""
    if not told["live"]["ok"]:
        return "dead", f"Stalled: {told['live']['reason']}"
    if not told["ready"]["ok"]:
        return "unready", f"Not ready: {told['ready']['reason']}"
    return "ok", "Live and ready"


def _position(told: list[Reported]) -> dict[str, dict[str, int]]:
    """The offset that is read next, by input and partition."""
    made: dict[str, dict[str, int]] = {}
    for each in told:
        for stream, offset in sorted(each.position.items()):
            made.setdefault(stream.input, {})[str(stream.partition)] = offset
    return made


def _figures(told: Mapping[str, Any], latest: Mapping[str, float], task: str) -> list[tuple[str, str, str]]:
    """(name, title, text); names of series are those of `COLUMNS`."""
    loss = "RMSE" if task == "regression" else "Log-loss"
    running = _age(told["time"] - told["began"])
    saved = told["checkpoint"]
    several = len(told["shards"]) > 1 and told["shard"] is None
    worst = " (worst shard)" if several else ""
    mean = " (mean of shards)" if several else ""
    positions = [f"{name}-{part}: {at:,}" for name, parts in told["position"].items() for part, at in parts.items()]
    rows = [
        ("records", "Records read since the start", f"{told['records']:,}"),
        ("events_per_s", "Records per second", _number(latest, "events_per_s", "{:,.1f}".format)),
        ("lag_records", "Records that wait", _number(latest, "lag_records", "{:,.0f}".format)),
        ("lag_s", f"Behind by{worst}", _number(latest, "lag_s", _age)),
        ("loss", f"{loss}, recent window{mean}", _number(latest, "loss")),
        ("loss_frozen", f"{loss} of frozen weights, on a sample", _number(latest, "loss_frozen")),
        ("loss_sampled", f"{loss} of this model, on that sample", _number(latest, "loss_sampled")),
        ("loss_constant", f"{loss} of a constant", _number(latest, "loss_constant")),
        ("loss_without_memory", f"{loss} without error memory", _number(latest, "loss_without_memory")),
        ("loss_live", f"{loss} of the live model", _number(latest, "loss_live")),
        ("ne", f"Normalised entropy{mean}", _number(latest, "ne")),
        ("auc", f"AUC{mean}", _number(latest, "auc")),
        ("calibration", f"Calibration{mean}", _number(latest, "calibration")),
        ("dormant", f"Dormant units{worst}", _number(latest, "dormant", "{:.1%}".format)),
        ("joined", f"Events that got a label{mean}", _number(latest, "joined", "{:.1%}".format)),
        ("drift_alarms", "Drift alarms since the start", str(told["drift_alarms"])),
        ("dead_letters", "Dead letters since the start", f"{sum(told['dead_letters'].values()):,}"),
        (
            "checkpoint",
            f"Last checkpoint{worst}",
            "none yet" if saved["age_s"] is None else f"{_age(saved['age_s'])} ago",
        ),
        ("checkpoint_bytes", "Checkpoint size", f"{saved['bytes'] / 1e6:,.1f} MB" if saved["bytes"] else UNKNOWN),
        ("position", "Next offset", ", ".join(positions) or UNKNOWN),
        ("uptime", "Running for", running),
    ]
    return [row for row in rows if row[2] != UNKNOWN]


UNKNOWN = "\u2013"


def _number(latest: Mapping[str, float], name: str, said: Callable[[float], str] | None = None) -> str:
    value = latest.get(name, math.nan)
    return UNKNOWN if math.isnan(value) else (said or _digits)(value)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"
