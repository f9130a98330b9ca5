"""Plots: round ticks, the front of the best, marks where the numbers say, and lawful SVG."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

from hypothesis import example, given
from hypothesis import strategies as st

from llmc.compiler.report.markup import num, tag
from llmc.compiler.report.plots import Point, Scale, bars, front, heat, scatter

FINITE = st.floats(-1e6, 1e6, allow_nan=False)
POSITIVE = st.floats(1e-9, 1e9)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=40))
def test_front_is_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    """On the front is a place exactly when no other is at most as large on both axes."""
    points = [Point(x, y) for x, y in pairs]
    best = {(p.x, p.y) for p in front(points)}
    alone = {
        (p.x, p.y) for p in points
        if not any((q.x, q.y) != (p.x, p.y) and q.x <= p.x and q.y <= p.y for q in points)
    }  # fmt: skip
    assert best == alone


@given(st.lists(POSITIVE, min_size=2, max_size=20), st.booleans())
@example([1.0000000000000003e-09, 1e-09], False)
def test_ticks_are_round_few_and_inside(values: list[float], log: bool) -> None:
    """Ticks lie within the values and are 1, 2 or 5 times a power of ten where values differ."""
    scale = Scale.of(values, log)
    ticks = scale.ticks()
    slack = 1e-6 * max(abs(scale.low), abs(scale.high))
    assert all(scale.low - slack <= t <= scale.high + slack for t in ticks)
    assert len(ticks) <= 12
    assert all(-1e-6 <= scale.at(v) <= 1 + 1e-6 for v in values)
    if scale.log:
        return
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    leading = {round(g / 10 ** math.floor(math.log10(g)), 3) for g in gaps}
    assert leading <= {1.0, 2.0, 5.0, 10.0}


def test_heat_shades_by_value() -> None:
    """The least cell is the lightest, the largest the darkest, a missing one an outline."""
    values = {("q", "block0"): 1.0, ("q", "block1"): 3.0, ("k", "block0"): 2.0}
    root = ElementTree.fromstring(heat(["q", "k"], ["block0", "block1"], values, "x", str))
    shades = [(r.findtext("title"), r.get("fill-opacity")) for r in root.iter("rect")]
    cells = {title: shade for title, shade in shades if title is not None}
    assert cells == {
        "block0 q: 1.0": "0.08", "block1 q: 3.0": "1.00", "block0 k: 2.0": "0.54",
    }  # fmt: skip
    assert sum(r.get("class") == "none" for r in root.iter("rect")) == 1


def test_bars_are_as_tall_as_their_values() -> None:
    """Heights are shares of the largest; a layer without a value has no bar."""
    root = ElementTree.fromstring(bars(["a0", "a1", "a2"], [2.0, None, 4.0], "x", str))
    heights = [float(r.get("height", "")) for r in root.iter("rect")]
    assert heights == [48.0, 96.0]


def test_points_lie_where_they_say_and_names_are_escaped() -> None:
    """Further right is larger x, further up larger y; a name is text."""
    points = [Point(1.0, 1.0, "<b>"), Point(2.0, 3.0, "&", True)]
    drawn = scatter(points, ("bits", "loss"), "x", (str, str))
    first, second = ElementTree.fromstring(drawn).iter("circle")
    assert float(first.get("cx", "")) < float(second.get("cx", ""))
    assert float(first.get("cy", "")) > float(second.get("cy", ""))
    assert [c.get("class") for c in (first, second)] == ["best", "chosen"]
    assert "&lt;b&gt;" in drawn
    assert "<b>" not in drawn


def test_attributes_and_children_are_escaped() -> None:
    """A quote cannot leave its attribute, text cannot become an element."""
    made = tag("p", "<i>", tag("b", "&"), title='" onclick="x', class_="a", none=None)
    assert made == '<p title="&#34; onclick=&#34;x" class="a">&lt;i&gt;<b>&amp;</b></p>'


def test_coordinates_are_short() -> None:
    """One digit behind the point, none where it is zero, no negative zero."""
    assert [num(v) for v in (1.0, -0.01, 2.26, 1e5)] == ["1", "0", "2.3", "100000"]
