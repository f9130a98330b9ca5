"""``llmc passes``: what the passes say of themselves."""

from __future__ import annotations

from typing import Any

import click

from .output import Out, examples, output_options


@click.command(epilog=examples("llmc passes", "llmc passes w4", "llmc passes --json"))
@click.argument("name", required=False)
@output_options
def passes_command(name: str | None, out: Out) -> None:
    """List the passes, or show one: law, knobs, what it needs, where it refuses.

    A knob is set as PASS:KNOB=VALUE, for example w4:group=64,solver=rtn.
    """
    from ..pipeline.registry import all_passes, find
    from ..report.text import Table

    if name is not None:
        _one(name, out)
        return
    table = Table("", ("pass", "stage", "effect", "knobs", "what it does"))
    rows = []
    for called in all_passes():
        made = find(called)
        free = [k for k in made.knobs() if k not in made.variants[called]]
        table.rows.append(
            (called, made.stage, str(made.effect), " ".join(free), _first_sentence(made.law()))
        )
        rows.append(describe(called))
    out.table(table)
    out.text("llmc passes NAME shows one with its knobs.")
    out.data("passes", {"passes": rows})


def describe(name: str) -> dict[str, Any]:
    """Everything that a pass declares, as data."""
    from ..pipeline import order
    from ..pipeline.registry import find

    made = find(name)
    preset = made.variants[name]
    return {
        "name": name, "law": made.law(), "source": made.source, "stage": made.stage,
        "why_there": order.reason(made.stage), "effect": str(made.effect),
        "needs": list(made.needs), "preset": preset,
        "preconditions": [p.name for p in made.preconditions],
        "knobs": [
            {"name": k.name, "type": k.type.__name__, "default": k.default, "range": k.range_text(),
             "optional": k.optional, "help": k.help}
            for k in made.knobs().values() if k.name not in preset
        ],
    }  # fmt: skip


def _one(name: str, out: Out) -> None:
    from ..report.text import Table

    about = describe(name)
    out.data("passes", {"passes": [about]})
    preset = ", ".join(f"{k}={v}" for k, v in about["preset"].items())
    facts = [
        ("law", about["law"]),
        ("effect", about["effect"]),
        ("stage", f"{about['stage']}: {about['why_there']}"),
        ("statistics", ", ".join(about["needs"]) or "none"),
        ("preconditions", ", ".join(about["preconditions"]) or "the pattern holds"),
        ("source", about["source"]),
    ]
    if preset:
        facts.append(("preset", preset))
    out.text(name)
    for key, value in facts:
        out.text(f"  {key:<14}{value}")
    out.text("")
    knobs = Table("", ("knob", "default", "value", "meaning"))
    for k in about["knobs"]:
        default = "none" if k["default"] is None else str(k["default"]).lower()
        knobs.rows.append(
            (k["name"], default, k["range"] + (" or none" if k["optional"] else ""), k["help"])
        )
    out.table(knobs)


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    head, stop, _ = text.partition(". ")
    return head + ("." if stop else "")
