"""Elements of HTML and SVG as text; whatever is not an element already is escaped."""

from __future__ import annotations

from markupsafe import Markup, escape


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """One element. ``class_`` is written class, ``stroke_width`` stroke-width; None is left out."""
    given = Markup("").join(
        Markup(' {}="{}"').format(k.rstrip("_").replace("_", "-"), v)
        for k, v in attributes.items()
        if v is not None
    )
    if not inside:
        return Markup("<{0}{1}></{0}>").format(name, given)
    return Markup("<{0}{1}>{2}</{0}>").format(name, given, Markup("").join(map(escape, inside)))


def num(value: float) -> str:
    """A coordinate with at most one digit behind the point, so that a picture stays small."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def svg(width: float, height: float, label: str, *inside: object, class_: str = "plot") -> Markup:
    """A picture of its own width, narrower where the page is; ``label`` is what it shows."""
    return tag(
        "svg", *inside, class_=class_, role="img", aria_label=label,
        viewBox=f"0 0 {num(width)} {num(height)}", width=num(width), height=num(height),
    )  # fmt: skip


def text(x: float, y: float, content: object, *, class_: str | None = None,
         anchor: str | None = None) -> Markup:  # fmt: skip
    """Text at its base line; ``anchor`` is start, middle or end."""
    return tag("text", content, x=num(x), y=num(y), class_=class_, text_anchor=anchor)


def box(x: float, y: float, width: float, height: float, *inside: object,
        class_: str | None = None, **more: object) -> Markup:  # fmt: skip
    """A rectangle; ``inside`` may be a title, which browsers show where the pointer rests."""
    return tag("rect", *inside, x=num(x), y=num(y), width=num(width), height=num(height),
               class_=class_, **more)  # fmt: skip
