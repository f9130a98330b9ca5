"""One fused op in the making: its linears, what joins them before and behind, body and parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..compiler.ir.graph import Program
from ..compiler.ir.ops import row_of
from ..compiler.ir.ops.fused import Ref, Step, inputs_of, write
from .by_row import BY_PLANE
from .coded import LEFT, by_rows
from .fuse_before import Before, centred, grid_words
from .fuse_chain import Core
from .fuse_nodes import argument
from .problem import Problem
from .row import TILE_ROWS

# Parts that all linears of one input share.
_COMMON = ("columns",)


@dataclass(frozen=True)
class Unit:
    """What one kernel call shall do.

    Attributes:
        cores: linears of one input, their rows joined in this order.
        before: what it does to its input, nearest to the linear first.
        gate: the call that joins two linears, or the halves of one, to act(gate) · up; cuts: those
            halves; act: the activation behind one; norm: of the rows of the result; add: the sum
            behind.
        apart: whether products of low rank stay apart where linears are joined.
    """

    cores: tuple[Core, ...]
    before: tuple[Before, ...] = ()
    gate: fx.Node | None = None
    cuts: tuple[fx.Node, ...] = ()
    act: fx.Node | None = None
    norm: fx.Node | None = None
    add: fx.Node | None = None
    apart: bool = False

    @property
    def problem(self) -> Problem:
        """What a kernel must serve."""
        first = self.cores[0].problem
        out = replace(
            first, N=sum(c.problem.N for c in self.cores),
            bias=any(c.problem.bias for c in self.cores), residual=self.add is not None,
        )  # fmt: skip
        if len(self.cores) > 1:
            table = "row" if first.table else ""
            out = replace(
                out, rank=sum(c.problem.rank for c in self.cores), table=table,
                kept=sum(c.problem.kept for c in self.cores), spans=self.spans,
                out_mixed=" ".join(c.problem.out_mixed for c in self.cores).strip(),
            )  # fmt: skip
        kinds = {b.kind: b.node for b in self.before}
        if "rounds" in kinds:
            out = replace(out, rounded="", rounds=grid_words(kinds["rounds"], values=True))
        if "norm" in kinds:
            norm = kinds["norm"]
            eps = float(str(norm.kwargs["eps"]))
            out = replace(out, norm=True, centred=centred(norm), eps=eps)
        elif "smooth" in kinds or "mixed" in kinds:
            out = replace(out, smooth=True)
        if "mixed" in kinds:
            out = replace(out, mixed=True)
        behind = self.gate or self.act
        if behind is not None:
            pairs = "gate" if self.gate is not None else ""
            out = replace(out, act=str(behind.kwargs["act"]), pairs=pairs)
        if self.norm is not None:
            out = replace(out, out_norm=True, out_eps=float(str(self.norm.kwargs["eps"])))
        return out

    @property
    def spans(self) -> str:
        """Rows x rank of each linear; beside codes only where whole tiles of rows have a product,
        as otherwise all of them can have it."""
        of = [c.problem for c in self.cores]
        rows = [p.N for p in of]
        whole = self.gate is not None or not any(n % TILE_ROWS for n in rows[:-1])
        if not (self.apart and of[0].rank and (whole or of[0].weights == "factors")):
            return ""
        return " ".join(f"{p.N}x{p.rank}" for p in of)

    @property
    def root(self) -> fx.Node | None:
        """The call whose value it gives; None where it gives those of several linears."""
        for node in (self.add, self.norm, self.gate, self.act):
            if node is not None:
                return node
        return self.cores[0].result if len(self.cores) == 1 else None

    @property
    def tail(self) -> fx.Node | None:
        """The same without the sum."""
        return replace(self, add=None).root

    @property
    def lone(self) -> bool:
        """Whether it is a dense product, with a bias or without, and nothing else."""
        first = self.cores[0]
        p = first.problem
        beside = p.rank or p.sparse or p.bitmap or bool(p.out_mixed)
        return (
            first.problem.weights == "dense" and not (beside or first.problem.m)
            and len(self.cores) == 1 and not self.before and self.root is first.result
        )  # fmt: skip

    @property
    def x(self) -> fx.Node:
        """What it reads, as the graph stands now."""
        return self.before[-1].reads if self.before else self.cores[0].reads

    @property
    def residual(self) -> fx.Node | None:
        """What is added, as the graph stands now."""
        if self.add is None:
            return None
        a, b = self.add.args
        other = b if a is self.tail else a
        assert isinstance(other, fx.Node)
        return other

    @property
    def nodes(self) -> set[fx.Node]:
        """All calls that it stands for."""
        behind = {n for n in (self.gate, self.act, self.norm, self.add) if n is not None}
        before = {b.node for b in self.before}
        return behind.union(before, self.cuts, *(c.nodes for c in self.cores))

    def fewer(self) -> Iterator[tuple[Unit, str, fx.Node]]:
        """The same with less and less behind it; with each the name and node of what was left."""
        unit = self
        if unit.add is not None:
            left, unit = unit.add, replace(unit, add=None)
            yield unit, "residual", left
        if unit.norm is not None:
            left, unit = unit.norm, replace(unit, norm=None)
            yield unit, "out_norm", left
        behind = unit.act or unit.gate
        if behind is not None:
            name = "act" if unit.act is not None else "pairs"
            yield replace(unit, act=None, gate=None, cuts=()), name, behind


def alike(problem: Problem) -> Problem:
    """What linears must have in common to be joined by rows."""
    return replace(
        problem, N=0, bias=False, kept=0, rank=min(problem.rank, 1),
        table="row" if problem.table else "", out_mixed="any" if problem.out_mixed else "",
    )  # fmt: skip


# ** body **


@dataclass(frozen=True)
class Part:
    """Values of a body that make one canonical part, joined by rows; None is a row of zeros."""

    role: str
    refs: tuple[str | None, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class Body:
    """The text of a fused op, the nodes that it reads, and its parts."""

    text: str
    inputs: tuple[fx.Node, ...]
    parts: tuple[Part, ...]
    ops: tuple[str, ...]


def body_of(unit: Unit) -> Body:
    """Spell a unit's calls; x is its first input, the residual the second."""
    inside = unit.nodes
    inputs: list[fx.Node] = [unit.x]
    residual = unit.residual
    if residual is not None and residual is not unit.x:
        inputs.append(residual)
    root = unit.root
    ends = [c.result for c in unit.cores] if root is None else [root]
    steps, names = spell(ends, inside, inputs)
    if root is None:
        joined: Any = [Ref(names[e]) for e in ends]
        steps.append(Step(f"v{len(steps)}", "aten.cat.default", (joined, -1), {}))
    ops = tuple(s.op for s in steps)
    return Body(write(steps), tuple(inputs), tuple(_parts(unit, names)), ops)


def spell(
    ends: Iterable[fx.Node], inside: Collection[fx.Node], inputs: list[fx.Node],
    sizes: Mapping[fx.Node, tuple[fx.Node, int]] | None = None,
) -> tuple[list[Step], dict[fx.Node, str]]:  # fmt: skip
    """The calls of ``inside`` that ``ends`` need, in order, and what each value is called.

    inputs: read first; whatever else is read from outside is put behind them. sizes: integers that
    are asked of one of the inputs, at an axis.
    """
    names = dict(zip(inputs, inputs_of(len(inputs)), strict=True))
    steps: list[Step] = []

    def visit(node: fx.Node) -> None:
        if node in names:
            return
        asked = (sizes or {}).get(node)
        if asked is None and node not in inside:
            inputs.append(node)
            names[node] = inputs_of(len(inputs))[-1]
            return
        if asked is None:
            for used in node.all_input_nodes:
                visit(used)
            call = row_of(node).name, *_spelled(node, names)
        else:
            call = "aten.sym_size.int", (Ref(names[asked[0]]), asked[1]), {}
        names[node] = f"v{len(steps)}"
        steps.append(Step(names[node], *call))

    for end in ends:
        visit(end)
    return steps, names


def _spelled(node: fx.Node, names: Mapping[fx.Node, str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def one(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Ref(names[value])
        if isinstance(value, (list, tuple)):
            return [one(v) for v in value]
        return value

    return tuple(one(a) for a in node.args), {k: one(v) for k, v in node.kwargs.items()}


def _parts(unit: Unit, names: Mapping[fx.Node, str]) -> Iterator[Part]:
    roles = dict.fromkeys(r for c in unit.cores for r in c.parts)
    for role in roles:
        nodes = [c.parts.get(role) for c in unit.cores]
        if role in _COMMON:
            nodes = nodes[:1]
        yield Part(role, tuple(None if n is None else names[n] for n in nodes))
    for before in unit.before:
        for role, node in before.parts.items():
            offset = float(str(before.node.kwargs.get("offset", 0.0)))
            yield Part(role, (names[node],), offset if role == "gain" else 0.0)
    gain = None if unit.norm is None else argument(unit.norm, 1, "gain")
    if unit.norm is not None and gain is not None:
        yield Part("out_gain", (names[gain],), float(str(unit.norm.kwargs.get("offset", 0.0))))


def stored_values(
    program: Program, node: fx.Node, device: torch.device | str, wide: torch.dtype | None
) -> list[torch.Tensor | None]:
    """What a fused node reads of parameters, None where it reads no parameter.

    wide: the dtype that floats are brought to, where one is given.
    """
    values: list[torch.Tensor | None] = []
    for read in node.args[0]:  # type: ignore[union-attr]
        param = program.param_of(read)
        value = None if param is None else program.fetch(param.name).to(device)
        if value is not None and wide is not None and value.dtype.is_floating_point:
            value = value.to(wide)
        values.append(value)
    return values


def join(
    problem: Problem, parts: tuple[Part, ...], values: Mapping[str, torch.Tensor],
    sections: tuple[int, ...],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Canonical parts by role from the values of a body.

    sections: rows of each linear that is joined. A norm's gain and shift take a smoothing vector
    in; a norm without a gain gets ones.
    """
    out: dict[str, torch.Tensor] = {}
    widths = {"gain": problem.norm * problem.K, "out_gain": problem.out_norm * problem.outputs}
    for role, width in widths.items():
        if width:
            like = next(v for v in values.values() if v is not None)
            out[role] = torch.ones(width, device=like.device)
    for part in parts:
        given = [None if r is None else values[r] for r in part.refs]
        out[part.role] = _joined(part.role, given, sections)
        if part.role in ("gain", "shift", "out_gain"):  # in fp32 at least, as the norm multiplies
            wide = torch.promote_types(torch.float32, out[part.role].dtype)
            out[part.role] = out[part.role].to(wide) + part.offset
    if "gain" in out and "smooth" in out:
        smooth = out.pop("smooth")
        for role in {"gain", "shift"} & set(out):
            out[role] = out[role] * smooth.to(out[role].dtype)
    if problem.mixed and "smooth" in out:  # signs are stored as bytes
        out["smooth"] = out["smooth"].to(torch.promote_types(torch.float32, out["smooth"].dtype))
    for role in out:
        if role == "columns" or role.endswith("zero"):
            out[role] = out[role].to(torch.int64 if role == "columns" else torch.uint8)
    return out


def _joined(role: str, given: list[torch.Tensor | None], sections: tuple[int, ...]) -> torch.Tensor:
    like = next(t for t in given if t is not None)
    if len(given) == 1:
        return like
    tensors = [
        like.new_zeros(n, *like.shape[1:]) if t is None else t
        for t, n in zip(given, sections, strict=True)
    ]
    if role == "left":
        return torch.block_diag(*tensors)
    if role in LEFT:
        return by_rows(tensors)
    if role == "table":
        tensors = [t.expand(n, -1) for t, n in zip(tensors, sections, strict=True)]
    if role == "csr_starts":
        ends = [0]
        for t in tensors:
            ends.append(ends[-1] + int(t[-1]))
        moved = [t[:-1] + end for t, end in zip(tensors, ends, strict=False)]
        return torch.cat([*moved, like.new_tensor(ends[-1:])])
    return torch.cat(tensors, 1 if role in BY_PLANE else 0)
