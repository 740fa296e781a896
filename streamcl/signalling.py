"""The configuration of what sends signals, beside the drift detector of the served loss. See `streamcl.boundaries`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from streamcl.stations import Drift, NamedKind, Station, Stop


class Signalling(Station):
    kind: str
    name: str | None = Stop(
        None, pattern=r"^[A-Za-z0-9._-]{1,100}$", description="`source` of its signals; default: its kind"
    )

    @property
    def source(self) -> str:
        return self.name or self.kind


class SegmentBoundary(Signalling):
    """When `events.segment` changes."""

    kind: Literal["segment"] = "segment"
    signal: Literal["boundary"] = Stop("boundary", description="what it sends")


class ClockBoundary(Signalling):
    """Every so often, whatever the stream holds."""

    kind: Literal["clock"] = "clock"
    signal: Literal["boundary", "clock"] = Stop("boundary", description="what it sends")
    every_events: int | None = Stop(None, ge=1, description="labelled events from one signal to the next")
    every_s: float | None = Stop(None, gt=0, description="instead: event time from one signal to the next")


class DetectorBoundary(Signalling):
    """When the mean loss of what was served has risen: a drift detector of its own."""

    kind: Literal["detector"] = "detector"
    signal: Literal["boundary", "drift"] = Stop("boundary", description="what it sends")
    detector: Literal["adwin", "page_hinkley"] = Stop("adwin", description="watches the loss of what was served")
    delta: float | None = Stop(None, gt=0, description="sensitivity; default: the detector's own")
    threshold: float = Stop(50.0, gt=0, description="Page-Hinkley only")
    refractory_events: int = Stop(1000, ge=0, description="no second signal within this many labelled events")

    @property
    def drift(self) -> Drift:
        own = self.model_dump(include={"detector", "delta", "threshold", "refractory_events"})
        return Drift(**own)


class SurpriseBoundary(Signalling):
    """When a served loss stands out of those before it. Source: EM-LLM, Fountas et al. 2024, arXiv 2407.09450."""

    kind: Literal["surprise"] = "surprise"
    signal: Literal["boundary", "drift"] = Stop("boundary", description="what it sends")
    gamma: float = Stop(3.0, ge=0, description="deviations above the mean that are a surprise")
    window: int = Stop(128, ge=2, le=65_536, description="losses before it that it is compared with (count)")
    refractory_events: int = Stop(128, ge=0, description="no second signal within this many labelled events")


class NewClass(Signalling):
    """When a label comes for the first time."""

    kind: Literal["new_class"] = "new_class"
    signal: Literal["new_class", "boundary"] = Stop("new_class", description="what it sends")


BOUNDARIES: dict[str, type[Station]] = {
    "segment": SegmentBoundary,
    "clock": ClockBoundary,
    "detector": DetectorBoundary,
    "surprise": SurpriseBoundary,
    "new_class": NewClass,
}
AnyBoundary = SegmentBoundary | ClockBoundary | DetectorBoundary | SurpriseBoundary | NewClass
Boundary = Annotated[AnyBoundary, Field(discriminator="kind"), NamedKind]
