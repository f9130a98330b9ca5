"""Dependency groups for people: rows, a table, and what is alike in every block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis.blocks import is_block
from ..analysis.groups import Group, Member
from ..ir.graph import Program, info
from .text import Table, number, size

UNITS = {
    "neuron": "neuron", "head": "query, key and value head",
    "kv_group": "KV head with its query heads", "hidden": "hidden channel", "expert": "expert",
    "rotary_pair": "rotary pair", "value_channel": "channel of each value head",
    "channel": "channel",
}  # fmt: skip
"""What one unit is, by the group's kind."""


@dataclass(frozen=True)
class Alike:
    """Groups that differ only in the block in which they lie; the first stands for all."""

    groups: tuple[Group, ...]

    @property
    def first(self) -> Group:
        return self.groups[0]

    @property
    def id(self) -> str:
        """The id of one, or the ids of the first and the last."""
        if len(self.groups) == 1:
            return self.first.id
        return f"{self.first.id} … {self.groups[-1].id}"

    @property
    def where(self) -> str:
        if len(self.groups) > 1:
            return f"{len(self.groups)} blocks"
        return self.first.segment


def alike(program: Program, groups: Sequence[Group], merge: bool = True) -> list[Alike]:
    """Groups in order, those of several blocks joined where kind, sizes, costs and blocks agree."""
    found: dict[Any, list[Group]] = {}
    for i, g in enumerate(groups):
        shapes = Counter((m.role, m.axis, program.params[m.param].shape) for m in g.members)
        same = (
            g.kind, g.id.rpartition("/")[2], g.units, g.least, g.bytes_per_unit, g.flops_per_unit,
            frozenset(shapes.items()), frozenset(b.reason for b in g.blocked),
        )  # fmt: skip
        key = same if merge and is_block(g.segment) else i
        found.setdefault(key, []).append(g)
    return [Alike(tuple(part)) for part in found.values()]


def per_unit(group: Group, member: Member) -> int:
    """How many indices of the member's axis one unit takes."""
    return int((member.unit_of >= 0).sum()) // group.units


def names_of(program: Program, param: str) -> str:
    """What the model calls a parameter; its own name where the model knows none."""
    return " = ".join(program.params[param].names) or param


def why_blocked(program: Program, group: Group) -> str:
    """The first reason with its node and module path; empty where the group may be cut."""
    if not group.blocked:
        return ""
    first = group.blocked[0]
    path = info(program.node(first.node)).path
    more = f", and {len(group.blocked) - 1} more" if len(group.blocked) > 1 else ""
    return f"{first.reason} (node {first.node}{f', {path}' if path else ''}){more}"


def groups_table(program: Program, rows: Sequence[Alike]) -> Table:
    """One line per group, or per groups that are alike."""
    numbers = ("units", "axes", "bytes/unit", "flops/token/unit")
    table = Table("Groups", ("group", "unit", "where", *numbers, "blocked"), right=numbers)
    for row in rows:
        g = row.first
        table.rows.append((
            row.id, UNITS[g.kind], row.where, f"{g.units:,}", str(len(g.members)),
            size(g.bytes_per_unit), number(round(g.flops_per_unit)),
            why_blocked(program, g) or "no",
        ))  # fmt: skip
    return table


def members_table(program: Program, row: Alike) -> Table:
    """Every parameter axis of a group, with what one unit takes of it."""
    g = row.first
    title = f"{row.id}: what one {UNITS[g.kind]} takes"
    table = Table(title, ("parameter", "axis", "role", "indices", "of", "in the model"),
                  right=("axis", "indices", "of"))  # fmt: skip
    for m in g.members:
        table.rows.append((
            m.param, str(m.axis), m.role, f"{per_unit(g, m):,}", f"{len(m.unit_of):,}",
            names_of(program, m.param),
        ))  # fmt: skip
    return table


def groups_json(program: Program, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups as data, with the model's names of their parameters."""
    out = []
    for g in groups:
        about = g.to_json() | {"unit": UNITS[g.kind]}
        for member in about["members"]:
            member["names"] = list(program.params[member["param"]].names)
        for block in about["blocked"]:
            block["path"] = info(program.node(block["node"])).path
        out.append(about)
    return out
