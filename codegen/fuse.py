"""The fusion planner: decode chains and what surrounds their linear become one `llmc.fused_linear`.

    rms_norm(x; gain, eps) -> linear(., expand_nm(dequantize(codes, scale, zero), meta), b) -> + r

becomes fused_linear(x, codes, scale, zero, meta, b, r, gain), and with + linear(linear(., B), A)
behind it fused_linear(…, A, B) where the target has a kernel for that. The law is the op row's
reference; it differs from the chain only in the order of roundings. Sparse entries that add_csr
puts beside the decoded weight become a path of their own, csr_linear, behind the fused node. What
is not fused is a refusal with its node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..compiler.ir.graph import Param, Program, info, tensor_type
from ..compiler.ir.ops import row_of
from ..compiler.ir.ops.rounding import FLOATS
from ..compiler.ir.refusal import Refusal
from ..compiler.ir.segments import refresh_segments
from ..compiler.ir.types import same_type
from .problem import Problem, dtype_name

MAKER = "fuse"


@dataclass(frozen=True)
class Candidate:
    """A linear over a decoded weight: its nodes and the problem that a kernel must serve.

    ``side`` is the call that puts sparse entries beside the weight, ``low`` the product of low rank
    that is added to the result.
    """

    linear: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    meta: fx.Node | None
    problem: Problem
    side: fx.Node | None = None
    low: LowPath | None = None

    @property
    def result(self) -> fx.Node:
        """The last call that it stands for."""
        return self.linear if self.low is None else self.low.total


@dataclass(frozen=True)
class LowPath:
    """total = linear(x, W) + part, part = linear(few, left), few = linear(x, right).

    Nothing else reads the part or the few.
    """

    total: fx.Node
    part: fx.Node
    few: fx.Node
    left: fx.Node
    right: fx.Node


@dataclass(frozen=True)
class Fused:
    """One node that fusing made.

    Attributes:
        node: its name. linear: name of the linear it replaces. path: module path, for people.
        parts: op rows that it joins, in order of execution.
        problem: what it computes.
    """

    node: str
    linear: str
    path: str
    parts: tuple[str, ...]
    problem: Problem


@dataclass(frozen=True)
class FusePlan:
    """What was fused, and what was not and why."""

    fused: tuple[Fused, ...]
    refused: tuple[Refusal, ...]


Accept = Callable[[Problem], str | None]
"""Why a target has no kernel for a problem; None when it has one."""


def fuse(program: Program, accept: Accept, *, norm: bool = True, residual: bool = True) -> FusePlan:
    """Rewrite `program` in place; `norm` and `residual` allow those neighbours to join.

    A norm joins only when every reader of it is fused, for its result is then needed nowhere.
    """
    candidates, refused = find(program, accept)
    norms: dict[fx.Node, fx.Node] = {}
    if norm:
        norms, more = _norms(program, candidates)
        refused += more
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    adds = _residuals(candidates, order) if residual else {}
    fused = [_rewrite(program, c, adds.get(c.linear), norms) for c in candidates]
    if fused:
        program.prune()
        refresh_segments(program)
    return FusePlan(tuple(fused), tuple(refused))


def find(program: Program, accept: Accept) -> tuple[list[Candidate], list[Refusal]]:
    """Every `aten.linear` as a candidate or a refusal, in graph order."""
    found: list[Candidate] = []
    refused: list[Refusal] = []
    joined: set[fx.Node] = set()
    for linear in program.calls("aten.linear.default"):
        if linear in joined:
            continue
        answer = _candidate(program, linear)
        if isinstance(answer, Refusal):
            refused.append(answer)
            continue
        low = _low_path(linear)
        if low is not None:
            rank = int(tensor_type(low.left).shape[1])
            whole = replace(answer, problem=replace(answer.problem, rank=rank), low=low)
            if accept(whole.problem) is None:
                found.append(whole)
                joined |= {low.part, low.few}
                continue
        why = accept(answer.problem)
        if why is None:
            found.append(answer)
        else:
            refused.append(_refusal(linear, why, "kernel"))
    return found, refused


def _refusal(node: fx.Node, reason: str, predicate: str) -> Refusal:
    return Refusal(MAKER, node.name, reason, predicate, info(node).path)


def _is(node: object, op: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and row_of(node).name == op


def _argument(node: fx.Node, at: int, name: str) -> object:
    """A positional or keyword argument of a call; None when it is absent."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name)


def _candidate(program: Program, linear: fx.Node) -> Candidate | Refusal:
    weight = linear.args[1]
    chain: list[fx.Node] = []
    side = weight if _is(weight, "llmc.add_csr") else None
    if isinstance(side, fx.Node):
        chain.append(side)
        weight = side.args[0]
    expand = weight if _is(weight, "llmc.expand_nm") else None
    values = expand.args[0] if isinstance(expand, fx.Node) else weight
    if isinstance(expand, fx.Node):
        chain.append(expand)
    if not isinstance(values, fx.Node) or not _is(values, "llmc.dequantize"):
        made = "stored dense"
        if isinstance(values, fx.Node) and values.op == "call_function":
            made = f"made by {row_of(values).name}"
        return _refusal(linear, f"its weight is {made}, not decoded from codes", "decoded")
    chain.append(values)
    for node in chain:
        if len(node.users) != 1:
            reason = f"the decoded weight {node.name} is read {len(node.users)} times"
            return _refusal(linear, reason, "one_reader")
    stored = [values.args[0], values.args[1], _argument(values, 2, "zero")]
    stored.append(expand.args[1] if isinstance(expand, fx.Node) else None)
    for part in stored:
        if part is None:
            continue
        if program.param_of(part) is None:
            return _refusal(linear, f"{part} is computed, not stored", "stored")
        assert isinstance(part, fx.Node)
        if len(part.users) != 1:
            return _refusal(linear, f"{part.name} is read {len(part.users)} times", "one_reader")
    codes, scale, zero, meta = stored
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    if tensor_type(codes).rank != 2:
        return _refusal(linear, f"codes of rank {tensor_type(codes).rank}, not a matrix", "matrix")
    x, out = linear.args[0], tensor_type(linear)
    assert isinstance(x, fx.Node)
    problem = Problem(
        N=int(tensor_type(codes).shape[0]),
        K=int(tensor_type(x).shape[-1]),
        bits=int(str(values.kwargs["bits"])),
        group=int(str(values.kwargs["group"])),
        n=int(str(expand.kwargs["n"])) if isinstance(expand, fx.Node) else 0,
        m=int(str(expand.kwargs["m"])) if isinstance(expand, fx.Node) else 0,
        x_dtype=dtype_name(out.dtype),
        scale_dtype=dtype_name(tensor_type(scale).dtype),
        asym=zero is not None,
        bias=_argument(linear, 2, "bias") is not None,
        rounded=_rounded(x),
    )
    return Candidate(
        linear, codes, scale,
        zero if isinstance(zero, fx.Node) else None,
        meta if isinstance(meta, fx.Node) else None,
        problem,
        side if isinstance(side, fx.Node) else None,
    )  # fmt: skip


def _low_path(linear: fx.Node) -> LowPath | None:
    """The product of low rank that is added to a linear's result, made of the same input."""
    total = next(iter(linear.users), None)
    if total is None or len(linear.users) != 1 or not _is(total, "aten.add.Tensor"):
        return None
    if len(total.args) != 2 or total.kwargs or total.args[0] is not linear:
        return None
    part = total.args[1]
    few = part.args[0] if isinstance(part, fx.Node) and _is(part, "aten.linear.default") else None
    if not isinstance(few, fx.Node) or not _is(few, "aten.linear.default"):
        return None
    assert isinstance(part, fx.Node)
    alone = len(part.users) == len(few.users) == 1 and few.args[0] is linear.args[0]
    plain = all(_argument(n, 2, "bias") is None for n in (part, few))
    left, right = part.args[1], few.args[1]
    if not (alone and plain and isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    return LowPath(total, part, few, left, right)


def _rounded(x: fx.Node) -> str:
    """The grid that a linear's input was put on, in words."""
    if not _is(x, "llmc.round_input"):
        return ""
    k = x.kwargs
    words = [f"{k['kind']}{'' if k['kind'] in FLOATS else k['bits']}", str(k["per"])]
    words += [name for name in ("group", "power", "limit") if k.get(name)]
    return " ".join(words)


def _residuals(
    candidates: Iterable[Candidate], order: dict[fx.Node, int]
) -> dict[fx.Node, fx.Node]:
    """linear -> the sum that is its only reader, of two values of the linear's own type.

    When both addends are candidates the later one takes the sum, so the other one is ready by then.
    """
    taken: dict[fx.Node, fx.Node] = {}
    found = {}
    for candidate in sorted(candidates, key=lambda c: order[c.linear], reverse=True):
        linear, result = candidate.linear, candidate.result
        if len(result.users) != 1:
            continue
        add = next(iter(result.users))
        if not _is(add, "aten.add.Tensor") or len(add.args) != 2 or add.kwargs or add in taken:
            continue
        other = add.args[1] if add.args[0] is result else add.args[0]
        if not isinstance(other, fx.Node) or other is result:
            continue
        if same_type(info(other).type, info(result).type):
            taken[add] = linear
            found[linear] = add
    return found


def _norms(
    program: Program, candidates: Iterable[Candidate]
) -> tuple[dict[fx.Node, fx.Node], list[Refusal]]:
    """norm -> the node of its effective gain, for norms that only candidates read as their x."""
    linears = {c.linear for c in candidates}
    whole = {c.linear for c in candidates if c.side is None}
    gains: dict[fx.Node, fx.Node] = {}
    refused: list[Refusal] = []
    for norm in list(program.calls("llmc.rms_norm")):
        if not linears & set(norm.users):
            continue
        why = _norm_refusal(norm, whole)
        if why is not None:
            refused.append(_refusal(norm, *why))
        else:
            gains[norm] = _effective_gain(program, norm)
    return gains, refused


def _norm_refusal(norm: fx.Node, linears: set[fx.Node]) -> tuple[str, str] | None:
    others = [u for u in norm.users if u not in linears or u.args[0] is not norm]
    if others:
        names = ", ".join(sorted(u.name for u in others))
        return f"the norm is also read by {names}, which is not fused whole", "all_readers_fused"
    x, gain = norm.args[0], _argument(norm, 1, "gain")
    assert isinstance(x, fx.Node)
    if not isinstance(gain, fx.Node) or gain.op != "get_attr":
        return "the norm has no stored gain", "stored_gain"
    width, count = tensor_type(x).shape[-1], norm.kwargs.get("count")
    if count is not None and count != width:
        return f"the norm divides by {count}, its input has {width} columns", "count"
    if tensor_type(x).dtype == torch.float16:
        return "x * gain may leave the range of fp16 before 1/rms is applied", "range"
    return None


def _effective_gain(program: Program, norm: fx.Node) -> fx.Node:
    """The gain as multiplied: the stored one, or a new fp32 parameter offset + gain."""
    gain = _argument(norm, 1, "gain")
    assert isinstance(gain, fx.Node)
    offset = float(str(norm.kwargs.get("offset", 0.0)))
    if not offset:
        return gain
    old = program.params[str(gain.target)]
    name = f"{old.name}.effective.{norm.name}"
    param = Param(name, old.shape, torch.float32, (), old.trained, keep=True)
    return program.add_param(param, program.fetch(old.name).float() + offset, before=norm)


def _rewrite(
    program: Program,
    candidate: Candidate,
    add: fx.Node | None,
    norms: dict[fx.Node, fx.Node],
) -> Fused:
    linear, problem = candidate.linear, candidate.problem
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    gain = norms.get(x)
    parts = ["llmc.rms_norm"] if gain is not None else []
    parts += ["llmc.dequantize", *(["llmc.expand_nm"] if problem.m else []), "aten.linear.default"]
    side = candidate.side
    eps = 0.0
    if gain is not None:
        eps = float(str(x.kwargs["eps"]))
        x = x.args[0]
    root, other, low = candidate.result, None, candidate.low
    if low is not None:
        parts += ["aten.linear.default", "aten.linear.default", "aten.add.Tensor"]
    if add is not None:
        # Read now: the other addend may have been a linear that was fused a moment ago.
        root, other = add, add.args[1] if add.args[0] is root else add.args[0]
        parts.append("aten.add.Tensor")
    made = program.emit(
        "llmc.fused_linear", x, candidate.codes, candidate.scale, candidate.zero, candidate.meta,
        _argument(linear, 2, "bias"), other, gain,
        *(() if low is None else (low.left, low.right)), bits=problem.bits, group=problem.group,
        columns=problem.K, n=problem.n, m=problem.m, eps=eps,
        before=root, made_by=MAKER, like=linear,
    )  # fmt: skip
    out = made
    if side is not None:
        out = program.emit(
            "llmc.csr_linear", made, linear.args[0], *side.args[1:],
            before=root, made_by=MAKER, like=linear,
        )  # fmt: skip
    root.replace_all_uses_with(out)
    problem = replace(problem, norm=gain is not None, residual=other is not None, eps=eps)
    return Fused(made.name, linear.name, info(linear).path, tuple(parts), problem)
