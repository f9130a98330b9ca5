"""Plots as SVG: bars by layer, a heat map of layers and roles, and points with their front.

Colours come from the page's style sheet, so that one picture serves light and dark; numbers are in
the titles of the marks and in the tables beside the plots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .markup import box, num, svg, tag, text

Show = Callable[[float], str]
_WIDE = 860.0
_LEFT, _RIGHT, _TOP = 78.0, 16.0, 8.0
# Where the name of a point may stand, above or below it.
_OFFSETS = (-4, 13, 4, -16, 25, -28, 37, -40)


@dataclass(frozen=True)
class Scale:
    """Values to 0..1, linear or by logarithm; one value alone is in the middle."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], log: bool = False) -> Scale:
        """From the least to the largest; ``log`` only where all are above 0 and decades apart."""
        found = list(values)
        low, high = min(found), max(found)
        return cls(low, high, log and low > 0 and high > 2 * low)

    def at(self, value: float) -> float:
        """Where a value lies, 0 at the least."""
        if self.high == self.low:
            return 0.5
        low, high, mine = (self._bent(v) for v in (self.low, self.high, value))
        return (mine - low) / (high - low)

    def _bent(self, value: float) -> float:
        return math.log(value) if self.log else value

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside, 1, 2 or 5 times a power of ten."""
        # What differs by a few last places has no round values between.
        if self.high - self.low <= 1e-12 * max(abs(self.low), abs(self.high)):
            return [self.low]
        return self._decades(most) if self.log and self.high > 8 * self.low else self._even(most)

    def _even(self, most: int) -> list[float]:
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s for s in (power, 2 * power, 5 * power, 10 * power) if s >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def _decades(self, most: int) -> list[float]:
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for parts in ((1, 2, 5), (1,)):
            found = [p * 10.0**e for e in range(low, high + 1) for p in parts]
            inside = [v for v in found if self.low <= v <= self.high]
            if len(inside) <= most:
                return inside
        return inside[:: -(-len(inside) // most)]


def bars(names: Sequence[str], values: Sequence[float | None], label: str, show: Show) -> Markup:
    """One bar per name from 0 up, None as a gap; ``label`` says what is shown and in what."""
    tall = 96.0
    top = max((v for v in values if v is not None), default=0.0) or 1.0
    step = min(26.0, (_WIDE - _LEFT - _RIGHT) / max(len(names), 1))
    inside: list[object] = []
    for mark in (0.0, top):
        y = _TOP + tall * (1 - mark / top)
        told = "0" if mark == 0 else show(mark)
        inside += [_rule(_LEFT, y, _LEFT + step * len(names)),
                   text(_LEFT - 6, y + 4, told, anchor="end")]  # fmt: skip
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is not None:
            high = tall * max(value, 0) / top
            x, y = _LEFT + i * step, _TOP + tall - high
            title = tag("title", f"{name}: {show(value)}")
            inside.append(box(x + step * 0.1, y, step * 0.8, high, title, class_="bar"))
    inside += _names(names, step, _TOP + tall + 14)
    return svg(_LEFT + step * len(names) + _RIGHT, _TOP + tall + 22, label, *inside)


def heat(
    rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float],
    label: str, show: Show, *, log: bool = False,
) -> Markup:  # fmt: skip
    """Cells (row, column), darker where the value is larger; a cell without one is an outline."""
    scale = Scale.of(values.values(), log)
    left = max(_LEFT, 12 + 6.6 * min(22, max(map(len, rows), default=0)))
    wide = min(26.0, (_WIDE - left - _RIGHT) / max(len(columns), 1))
    tall = 18.0
    inside: list[object] = []
    for j, row in enumerate(rows):
        y = _TOP + j * tall
        inside.append(text(left - 6, y + 13, _short(row), anchor="end"))
        for i, column in enumerate(columns):
            value = values.get((row, column))
            place = (left + i * wide, y, wide - 1, tall - 1)
            if value is None:
                inside.append(box(*place, class_="none"))
                continue
            title = tag("title", f"{column} {row}: {show(value)}")
            shade = f"{0.08 + 0.92 * scale.at(value):.2f}"
            inside.append(box(*place, title, class_="bar", fill_opacity=shade))
    bottom = _TOP + len(rows) * tall
    inside += _names(columns, wide, bottom + 13, left)
    x = left
    for i in range(5):
        shade = f"{0.08 + 0.92 * i / 4:.2f}"
        inside.append(box(x + i * 14, bottom + 22, 14, 10, class_="bar", fill_opacity=shade))
    kind = ", by logarithm" if scale.log else ""
    about = f"{show(scale.low)} … {show(scale.high)}{kind}"
    inside.append(text(x + 78, bottom + 31, about))
    width = max(left + wide * len(columns), left + 78 + 7 * len(about)) + _RIGHT
    return svg(width, bottom + 40, label, *inside)


def _names(names: Sequence[str], step: float, y: float, left: float = _LEFT) -> Iterable[Markup]:
    """Names under their places, as many as there is room for; blocks go by their number alone."""
    short = [_digits(n) or _short(n) for n in names]
    room = max((6.6 * len(s) + 4 for s in short if s.isdigit()), default=20.0)
    every = max(1, math.ceil(room / step))
    for i, name in enumerate(short):
        if i % every == 0 and (name.isdigit() or step >= 6.6 * len(name)):
            yield text(left + (i + 0.5) * step, y, name, anchor="middle")


def _digits(name: str) -> str:
    """The number at the end of ``block12``."""
    return name[len(name.rstrip("0123456789")) :]


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _rule(x: float, y: float, end: float) -> Markup:
    return tag("line", x1=num(x), y1=num(y), x2=num(end), y2=num(y), class_="rule")


@dataclass(frozen=True)
class Point:
    """A result: the smaller on both axes, the better; ``chosen`` is drawn larger."""

    x: float
    y: float
    name: str = ""
    chosen: bool = False


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other is as small as on both axes and smaller on one, by x."""
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, p.y)):
        if not out or p.y < out[-1].y:
            out.append(p)
    return out


@dataclass(frozen=True)
class _Space:
    """A rectangle that a mark or a name takes."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Space) -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)


def scatter(
    points: Sequence[Point], axes: tuple[str, str], label: str, shows: tuple[Show, Show],
    *, log: bool = False,
) -> Markup:  # fmt: skip
    """Points with names, and the front of those that are best joined by steps."""
    width, height, bottom = 720.0, 360.0, 46.0
    xs, ys = Scale.of(p.x for p in points), Scale.of((p.y for p in points), log)

    def place(p: Point) -> tuple[float, float]:
        inner = (width - _LEFT - 150, height - _TOP - bottom - 24)
        return _LEFT + 12 + inner[0] * xs.at(p.x), _TOP + 12 + inner[1] * (1 - ys.at(p.y))

    inside: list[object] = []
    for value in ys.ticks():
        y = place(Point(xs.low, value))[1]
        inside += [_rule(_LEFT, y, width - _RIGHT),
                   text(_LEFT - 6, y + 4, shows[1](value), anchor="end")]  # fmt: skip
    for value in xs.ticks():
        x = place(Point(value, ys.low))[0]
        inside += [
            tag("line", x1=num(x), y1=num(_TOP), x2=num(x), y2=num(height - bottom), class_="rule"),
            text(x, height - bottom + 16, shows[0](value), anchor="middle"),
        ]
    inside.append(text(_LEFT, height - 8, f"{axes[0]} →   ({axes[1]} ↑)", class_="axis"))
    best = front(points)
    steps = ""
    for i, p in enumerate(best):
        x, y = place(p)
        steps += f"M{num(x)},{num(y)}" if i == 0 else f"H{num(x)}V{num(y)}"
    inside.append(tag("path", d=steps, class_="front"))
    kept = set(best)
    taken = [_Space(x - 6, y - 6, x + 6, y + 6) for x, y in map(place, points)]
    for p in points:
        x, y = place(p)
        title = tag("title", f"{p.name}: {axes[0]} {shows[0](p.x)}, {axes[1]} {shows[1](p.y)}")
        kind = "chosen" if p.chosen else "best" if p in kept else "point"
        inside.append(tag("circle", title, cx=num(x), cy=num(y), r=6 if p.chosen else 4,
                          class_=kind))  # fmt: skip
        if p.name:
            name = _short(p.name, 26)
            right = x + 8 + 6.4 * len(name)
            spaces = [_Space(x + 8, y + d - 9, right, y + d + 3) for d in _OFFSETS]
            inner = [s for s in spaces if s.top >= 0 and s.bottom <= height - bottom]
            free = next((s for s in inner if not any(map(s.meets, taken))), None)
            if free is not None:  # else the title and the table name it
                taken.append(free)
                inside.append(text(free.left, free.bottom - 3, name))
    return svg(width, height, label, *inside)
