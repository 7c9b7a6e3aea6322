"""The small invented project that `demo` commits, change by change.

Its names occur in no other code, so what a completion knows of them it knows from the adapter.
"""

from __future__ import annotations

_STATION = '''\
"""Tide gauges along a coast."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GaugeStation:
    """One tide gauge, and how its water moves."""

    name: str
    latitude_deg: float
    mean_level_m: float


def nearest_station(stations: list[GaugeStation], latitude_deg: float) -> GaugeStation:
    """Return the station closest to a latitude."""
    return min(stations, key=lambda station: abs(station.latitude_deg - latitude_deg))
'''

_HARMONIC = '''\
"""Harmonic constituents: the cosines that a tide is the sum of."""

import math
from dataclasses import dataclass

LUNAR_SPEED_DEG_H = 28.984
SOLAR_SPEED_DEG_H = 30.0


@dataclass(frozen=True)
class HarmonicConstituent:
    """One cosine of the tide."""

    amplitude_m: float
    speed_deg_h: float
    phase_deg: float

    def height_m(self, hours: float) -> float:
        """Return this constituent's part of the water level."""
        angle_deg = self.speed_deg_h * hours - self.phase_deg
        return self.amplitude_m * math.cos(math.radians(angle_deg))
'''

_PREDICT = '''\
"""Predict the water level at a station."""

from tidewater.harmonic import HarmonicConstituent
from tidewater.station import GaugeStation


def predict_level_m(
    station: GaugeStation, constituents: list[HarmonicConstituent], hours: float
) -> float:
    """Return the water level above chart datum."""
    tide_m = sum(constituent.height_m(hours) for constituent in constituents)
    return station.mean_level_m + tide_m
'''

_EXTREMES = '''\
"""Find high and low water."""

from tidewater.harmonic import HarmonicConstituent
from tidewater.predict import predict_level_m
from tidewater.station import GaugeStation

STEP_HOURS = 0.1


def high_water_hours(
    station: GaugeStation, constituents: list[HarmonicConstituent], until_hours: float
) -> list[float]:
    """Return the hours at which the water stands highest."""
    found = []
    hours = STEP_HOURS
    while hours < until_hours:
        before_m = predict_level_m(station, constituents, hours - STEP_HOURS)
        now_m = predict_level_m(station, constituents, hours)
        after_m = predict_level_m(station, constituents, hours + STEP_HOURS)
        if before_m < now_m >= after_m:
            found.append(round(hours, 1))
        hours += STEP_HOURS
    return found
'''

_REPORT = '''\
"""Print a tide table."""

from tidewater.extremes import high_water_hours
from tidewater.harmonic import HarmonicConstituent
from tidewater.predict import predict_level_m
from tidewater.station import GaugeStation


def tide_table(station: GaugeStation, constituents: list[HarmonicConstituent]) -> list[str]:
    """Return one line for each high water of the coming day."""
    lines = [f"{station.name}, {station.latitude_deg:.2f} deg"]
    for hours in high_water_hours(station, constituents, 24.0):
        level_m = predict_level_m(station, constituents, hours)
        lines.append(f"{hours:5.1f} h  {level_m:5.2f} m")
    return lines
'''

_SURGE = '''\
"""What the wind adds to the tide."""

from tidewater.harmonic import HarmonicConstituent
from tidewater.predict import predict_level_m
from tidewater.station import GaugeStation


def surge_level_m(
    station: GaugeStation,
    constituents: list[HarmonicConstituent],
    hours: float,
    wind_m_s: float,
) -> float:
    """Return the water level with the wind's set-up added."""
    return predict_level_m(station, constituents, hours) + 0.002 * wind_m_s**2
'''

_ALARM = '''\
"""Warn before a gauge is flooded."""

from tidewater.harmonic import HarmonicConstituent
from tidewater.station import GaugeStation
from tidewater.surge import surge_level_m


def flood_warning(
    station: GaugeStation,
    constituents: list[HarmonicConstituent],
    hours: float,
    wind_m_s: float,
    limit_m: float,
) -> bool:
    """Tell whether the water will stand above a limit."""
    level_m = surge_level_m(
    return level_m > limit_m
'''

COMMITS: tuple[tuple[str, dict[str, str]], ...] = (
    ("add gauge stations", {"tidewater/__init__.py": "", "tidewater/station.py": _STATION}),
    ("add harmonic constituents", {"tidewater/harmonic.py": _HARMONIC}),
    ("predict the water level", {"tidewater/predict.py": _PREDICT}),
    ("find high water", {"tidewater/extremes.py": _EXTREMES}),
    ("print a tide table", {"tidewater/report.py": _REPORT}),
    ("add the wind's surge", {"tidewater/surge.py": _SURGE}),
)
"""(message, files) of each commit; the last one is made while the daemon runs."""

BEGUN = {"tidewater/alarm.py": _ALARM}
"""A file that is being written when the demo asks for a completion; never committed."""

ASKED = f"tidewater/alarm.py:{_ALARM[: _ALARM.index(' surge_level_m(')].count(chr(10)) + 1}"
"""Where it asks: the call that is not finished."""
