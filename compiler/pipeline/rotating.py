"""Rotations around a coded weight: y = U⁻¹(Ŵ' (V x)), how they become graph, tensors and a solve.

V = M S over the inputs, U over the outputs: S is a stored scale per channel, M the mix of
:mod:`..ir.ops.rotation`. Linears that read one value share V. With W' = U W V⁻¹ and H' = V H Vᵀ
the proxy loss is that of the unrotated weight, so the sweep that solves W' on H' is LDLQ behind
incoherence processing. Source: QuIP (arXiv 2307.13304).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, fx

from ..ir.build import result_type
from ..ir.errors import LlmcError, ModelError, UsageError
from ..ir.graph import Program, info, tensor_type
from ..ir.ops import row_of
from ..ir.ops.rotation import mix, rotate
from ..ir.scheme import Transform
from .inputs import piece

if TYPE_CHECKING:
    from .plan import Decision
    from .solving import Work

ROTATE = "llmc.rotate"
IN, OUT = "turn_in", "turn_out"
"""Ends of the names of the scales of both sides."""
FACT = "rotated"
"""The fact that tells which sides of which parameters are rotated in the weights themselves."""
MOST = 2.0**10
"""Rescaling stays within this factor either way, far inside of fp16."""


# ** graph **


def encode_rotation(
    program: Program, node: str, t_in: Transform | None, t_out: Transform | None, *, made_by: str
) -> list[str]:
    """Let linear(x, W, b) become U⁻¹ linear(V x, W') + b; after `encode_codes`.

    Returns the new parameters.
    Raises:
        UsageError: what reads x is rotated in another way.
    """
    linear = program.node(node)
    made: list[str] = []
    base = stored_name(linear).partition(".")[0]
    if t_in is not None:
        x = linear.args[0]
        assert isinstance(x, fx.Node)
        dtype = torch.float16 if t_in.scaled else torch.int8
        turned = _shared(program, x, dtype, base)
        if turned is None:
            first = min(u for u in x.users if reads_by_linear(u, x))
            inputs = int(tensor_type(x).shape[-1])
            scale = piece(program, base, first, linear, made_by, made, IN, (inputs,), dtype)
            turned = program.emit(ROTATE, x, scale, before=first, made_by=made_by, like=linear)
        linear.args = (turned, *linear.args[1:])
    if t_out is not None:
        bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
        linear.args, linear.kwargs = linear.args[:2], {}
        outputs = int(tensor_type(linear).shape[-1])
        readers, after = list(linear.users), linear.next
        scale = piece(program, base, after, linear, made_by, made, OUT, (outputs,), torch.int8)
        where: dict[str, Any] = {"before": after, "made_by": made_by, "like": linear}
        y = program.emit(ROTATE, linear, scale, inverse=True, **where)
        if bias is not None:
            y = program.emit("aten.add.Tensor", y, bias, **where)
        for reader in readers:
            reader.replace_input_with(linear, y)
        if program.output in readers:
            out = program.output
            out.meta["llmc"] = replace(info(out), type=result_type(out.args[0]))
    return made


def stored_name(linear: fx.Node) -> str:
    """The parameter that the linear's weight decodes from."""
    source: Any = linear.args[1]
    while source.op == "call_function":
        source = source.all_input_nodes[0]
    return str(source.target)


def reads_by_linear(user: fx.Node, x: fx.Node) -> bool:
    """Whether a call is a linear that multiplies x."""
    call = user.op == "call_function" and row_of(user).name == "aten.linear.default"
    return call and user.args[0] is x


def _shared(program: Program, x: fx.Node, dtype: torch.dtype, base: str) -> fx.Node | None:
    """The call that rotates x already.

    Raises:
        UsageError: it rescales where this one does not, or the other way round.
    """
    for user in x.users:
        if user.op != "call_function" or row_of(user).name != ROTATE:
            continue
        scale = program.param_of(user.args[1])
        if scale is None or not scale.name.endswith(f".{IN}"):
            continue
        if scale.dtype != dtype:
            raise UsageError(
                f"expected one rotation for all that read {x.name}, found rescale on and off",
                where=base,
                hint="what reads one value is rotated alike, or skipped",
            )
        return user
    return None


def already(program: Program) -> dict[str, frozenset[str]]:
    """Which sides of a parameter are rotated for good, ``in`` or ``out``, by name.

    Raises:
        ModelError: facts that say something else.
    """
    known = program.facts.get(FACT, {})
    if not isinstance(known, dict) or not all(isinstance(s, list) for s in known.values()):
        raise ModelError(f"expected rotated sides by parameter among the facts, found {known!r}")
    return {name: frozenset(map(str, sides)) for name, sides in known.items()}


# ** tensors **


def signs(n: int, seed: int, name: str) -> Tensor:
    """int8 [n] of ±1: the same for one seed and name everywhere."""
    # Torch seeds its generator with 32 bits.
    g = torch.Generator().manual_seed(crc32(f"{seed}:{name}".encode()))
    return (torch.randint(0, 2, (n,), generator=g) * 2 - 1).to(torch.int8)


def rescale(diagonal: Tensor, norms: Tensor) -> Tensor:
    """D̃ [n], D̃_j = (H_jj / ‖W_:j‖²)^¼ over its geometric mean; 1 where either is 0.

    x / D̃ and W D̃ minimise tr(H)·‖W‖² over all diagonal scales. diagonal: of H; norms: ‖W_:j‖².
    """
    live = (diagonal > 0) & (norms > 0)
    logs = torch.where(live, diagonal / norms, 1.0).double().log() / 4
    if bool(live.any()):
        logs = torch.where(live, logs - logs[live].mean(), 0.0)
    return logs.exp().clamp(1 / MOST, MOST).to(diagonal.dtype)


@dataclass(frozen=True)
class Turn:
    """The rotations around one weight, by their scales; None where a side is not rotated.

    tensors: what the planned graph reads of them, by parameter name.
    """

    into: Tensor | None = None
    out: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, w: Tensor) -> Tensor:
        """W' = U W V⁻¹ of W [m, n]."""
        if self.into is not None:
            w = mix(w / self.into.to(w))
        return w if self.out is None else rotate(w.t(), self.out).t().contiguous()

    def back(self, w: Tensor) -> Tensor:
        """U⁻¹ W' V: what an unrotated linear would read."""
        if self.into is not None:
            w = mix(w) * self.into.to(w)
        return w if self.out is None else rotate(w.t(), self.out, inverse=True).t().contiguous()

    def gram(self, h: Tensor) -> Tensor:
        """V H Vᵀ of H = XᵀX [n, n]."""
        if self.into is None:
            return h
        h = rotate(rotate(h, self.into).t(), self.into)
        return (h + h.t()) / 2


def turns(work: Work, members: Sequence[Decision], diagonal: Tensor | None) -> list[Turn | None]:
    """The rotations of decisions over one value; None of those that have none.

    diagonal: of XᵀX, which rescaling reads.
    """
    return [_turn(work, d, diagonal) if d.scheme.rotated else None for d in members]


def _turn(work: Work, d: Decision, diagonal: Tensor | None) -> Turn:
    made: dict[str, Tensor] = {}
    seed, into, out = int(d.options["seed"]), None, None
    if d.scheme.t_in is not None and d.scheme.t_in.online:
        turned = work.final.node(d.site.node).args[0]
        assert isinstance(turned, fx.Node)
        name = str(turned.args[1].target)  # type: ignore[union-attr]
        known = work.packed.get(name)
        made[name] = _into(work, d, turned, diagonal, seed) if known is None else known
        into = made[name].to(work.device)
    if d.scheme.t_out is not None and d.scheme.t_out.online:
        name = f"{d.site.param}.{OUT}"
        made[name] = signs(d.site.out_features, seed, f"{d.site.id}/out")
        out = made[name].to(work.device)
    return Turn(into, out, made)


def _into(
    work: Work, d: Decision, turned: fx.Node, diagonal: Tensor | None, seed: int
) -> Tensor:  # fmt: skip
    """The input scales that all weights behind one rotation share."""
    made = signs(d.site.in_features, seed, d.site.group)
    if d.scheme.t_in is None or not d.scheme.t_in.scaled:
        return made
    if diagonal is None:
        raise LlmcError(f"expected XᵀX to rescale {d.site.id}, found none")
    norms = torch.zeros_like(diagonal)
    for reader in turned.users:
        norms += work.weight(stored_name(reader).partition(".")[0]).square().sum(0)
    return (made.to(diagonal) / rescale(diagonal, norms)).to(torch.float16).cpu()
