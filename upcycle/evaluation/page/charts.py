"""Geometry of the page's charts: numbers in, places and shades out. How they look is the
template's affair."""

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

Matrix = Sequence[Sequence[float]]
FULL = 100.0
"""Charts are drawn in a square of this size, and stretched to the room there is."""
SHADES = 32
"""Steps between no colour and full colour, in images."""
ABOVE, BELOW = (62, 114, 232), (214, 103, 34)
"""In images, which can't follow the reader's colour scheme: seen on white and on black."""
POINTS = 200
"""A curve of more points is drawn by the means of so many stretches."""


@dataclass(frozen=True)
class Tick:
    """A number at a place along an axis, 0 to 100."""

    place: float
    value: float


@dataclass(frozen=True)
class Column:
    """One of the columns that stand side by side, `place` to `place + 1`."""

    name: int
    value: float
    height: float
    marked: bool


@dataclass(frozen=True)
class Columns:
    """A column chart from zero up."""

    columns: list[Column]
    ticks: list[Tick]
    peak: Column
    peak_place: float


@dataclass(frozen=True)
class Curve:
    """A line chart; `path` is in a square of 100 with y downward."""

    path: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    first: float
    last: float
    last_height: float


def columns(
    values: Sequence[float],
    names: Sequence[int],
    marked: Sequence[int] = (),
    *,
    full: float | None = None,
) -> Columns:
    """A column per value; those whose name is among the marked look different.

    Args:
        full: the value of a full column, if not the greatest.
    """
    scale = top(values) if full is None else full
    bars = [
        Column(name, value, round(FULL * share(value, scale), 2), name in marked)
        for name, value in zip(names, values, strict=True)
    ]
    peak = max(range(len(bars)), key=lambda i: (bars[i].height, bars[i].value))
    return Columns(bars, ticks(names), bars[peak], _middle(peak, len(bars)))


def ticks(names: Sequence[int]) -> list[Tick]:
    """Round numbers of those that stand side by side in rising order; about eight."""
    every = _step(len(names) / 8, whole=True)
    return [Tick(_middle(i, len(names)), name) for i, name in enumerate(names) if name % every == 0]


def places(count: int) -> list[Tick]:
    """Some of so many places side by side, at most 16, whatever stands there."""
    every = int(_step(count / 16, whole=True))
    return [Tick(_middle(i, count), i) for i in range(0, count, every)]


def _middle(place: int, count: int) -> float:
    return round(FULL * (place + 0.5) / count, 2)


def top(values: Sequence[float]) -> float:
    """The greatest of the values that are numbers."""
    return max((value for value in values if math.isfinite(value)), default=0.0)


def share(value: float, full: float) -> float:
    """How much of a full bar a value is, 0 to 1; what is not a number is nothing."""
    if not math.isfinite(value) or full <= 0:
        return 0.0
    return round(min(max(value / full, 0.0), 1.0), 4)


def curve(points: Sequence[tuple[float, float]]) -> Curve | None:
    """A line through points of rising x; None if fewer than two are finite."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) < 2:
        return None
    drawn = _thin(finite)
    low, high, ticks = _range([y for _, y in drawn])
    left, right = drawn[0][0], drawn[-1][0]
    width = right - left or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return round(FULL * (x - left) / width, 2), round(FULL * (high - y) / (high - low), 2)

    places = [place(x, y) for x, y in drawn]
    return Curve(
        path="M" + "L".join(f"{x:g} {y:g}" for x, y in places),
        x_ticks=[Tick(0, finite[0][0]), Tick(FULL, finite[-1][0])],
        y_ticks=[Tick(place(left, y)[1], y) for y in ticks],
        first=finite[0][1],
        last=finite[-1][1],
        last_height=places[-1][1],
    )


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points; the ends stay where they are in x."""
    size = math.ceil(len(points) / POINTS)
    if size == 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(_mean([x for x, _ in g]), _mean([y for _, y in g])) for g in groups]
    return [(points[0][0], means[0][1]), *means[1:-1], (points[-1][0], means[-1][1])]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _range(values: list[float]) -> tuple[float, float, list[float]]:
    """Round bounds around the values, and the round numbers from one to the other."""
    low, high = min(values), max(values)
    step = _step((high - low) / 3 or abs(high) / 3 or 1.0)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def _step(least: float, *, whole: bool = False) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below."""
    if whole and least <= 1:
        return 1
    power = 10.0 ** math.floor(math.log10(least))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= least * (1 - 1e-9))


def limit(ratios: Iterable[float]) -> float:
    """The least of 1.5, 2 and 4 that most ratios are within, above 1 and below."""
    distances = sorted(abs(math.log2(ratio)) for ratio in ratios if ratio > 0)
    within = distances[int(0.9 * (len(distances) - 1))] if distances else 0.0
    return next((limit for limit in (1.5, 2.0) if within <= math.log2(limit)), 4.0)


def tone(ratio: float, limit: float) -> float:
    """How far a ratio is from 1, on a logarithmic scale: 1 at the limit, -1 at its inverse."""
    if ratio <= 0:
        return -1.0
    return round(max(-1.0, min(1.0, math.log2(ratio) / math.log2(limit))), 2)


def together(affinity: Matrix) -> list[int]:
    """An order of the rows in which those of high affinity lie side by side."""
    size = len(affinity)
    if size < 3:
        return list(range(size))
    pairs = [[(affinity[i][j] + affinity[j][i]) / 2 for j in range(size)] for i in range(size)]
    top = max(map(max, pairs))
    distance = [[0.0 if i == j else top - pairs[i][j] for j in range(size)] for i in range(size)]
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=size <= 64)
    return [int(leaf) for leaf in leaves_list(tree)]


def image(tones_HW: Matrix) -> str:
    """A PNG as a data URI, a pixel per tone: 1 is ABOVE, 0 transparent, -1 BELOW."""
    height, width = len(tones_HW), len(tones_HW[0])
    levels = range(-SHADES, SHADES + 1)
    palette = b"".join(bytes(ABOVE if level > 0 else BELOW) for level in levels)
    alpha = bytes(round(255 * abs(level) / SHADES) for level in levels)
    rows = b"".join(b"\0" + bytes(SHADES + round(SHADES * t) for t in row) for row in tones_HW)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = [
        _chunk(b"IHDR", header), _chunk(b"PLTE", palette), _chunk(b"tRNS", alpha),
        _chunk(b"IDAT", zlib.compress(rows, 9)), _chunk(b"IEND", b""),
    ]  # fmt: skip
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
