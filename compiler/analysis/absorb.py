"""Absorbing a division upstream: the rules by which value / s becomes a change of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..ir.graph import Program
from .flow import LINEAR, is_cut, is_move
from .linears import sole_param
from .patterns import UNSCALED, Labels, only_on, pull_back, seen_through
from .ties import ATTENTION, as_int, is_element, op_name, shape_of

_RELU = "aten.relu.default"
_SCALES = frozenset({"aten.neg.default", "aten.mul.Scalar", "aten.div.Scalar"})
_NORMS = ("llmc.rms_norm", "llmc.layer_norm")
_KINDS = {
    **dict.fromkeys(_NORMS, "norm"), **dict.fromkeys(ATTENTION, "value"),
    **dict.fromkeys(("llmc.gated", "aten.mul.Tensor"), "product"), LINEAR: "linear",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Absorber:
    """A parameter that takes the division along one axis.

    The new tensor is (offset + t) · s[index]**power - offset; entries with index -1 stay.

    Attributes:
        param: its name.
        axis: the axis that carries the channels.
        index: int64 [length of the axis], the scale of each entry.
        power: -1, the division; 1 multiplies (keys, where queries are divided).
        offset: 1.0 for norms that store gain - 1, else 0.
    """

    param: str
    axis: int
    index: torch.Tensor
    power: int = -1
    offset: float = 0.0


class No(Exception):
    """Why a value cannot be rescaled: (predicate, reason, culprit)."""

    def __init__(self, predicate: str, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.predicate, self.reason, self.node = predicate, reason, node


class Builder:
    """Walks upstream from one value and collects absorbers and scales that must be equal."""

    def __init__(self, program: Program, channels: int) -> None:
        self.program = program
        self.labels = Labels(channels)
        self.absorbers: list[Absorber] = []
        self.kind = ""

    def finish(self) -> tuple[int, tuple[Absorber, ...], torch.Tensor]:
        """(number of scales, absorbers, scale of each channel), equal scales joined."""
        count, index = self.labels.compact()
        done = []
        for a in self.absorbers:
            joined = torch.where(a.index >= 0, index[a.index.clamp_min(0)], UNSCALED)
            done.append(Absorber(a.param, a.axis, joined, a.power, a.offset))
        return count, tuple(done), index

    def absorb(self, node: fx.Node, pattern: torch.Tensor, part: int = 0) -> None:
        """Divide a value by its pattern's scales; its readers have been looked after.

        Raises:
            No: something upstream cannot take the division exactly.
        """
        name = op_name(node)
        self.kind = self.kind or _KINDS.get(name, "")
        if is_move(node) or is_cut(node):
            back = pull_back(node, pattern, part)
            if back is None:
                raise No(
                    "moves_followed",
                    f"{node.name} moves channels untracked",
                    node,
                )
            self.upstream(back[0].node, back[1], node, back[0].part)
        elif name in _NORMS:
            self.norm(node, pattern)
        elif name == "llmc.gated":
            self.upstream(node.args[1], pattern, node)
        elif name == _RELU or (name == "llmc.activation" and node.kwargs.get("act") == "relu"):
            self.upstream(node.args[0], pattern, node)
        elif name in ATTENTION:
            self.attention(node, pattern)
        elif name == LINEAR:
            self.linear(node, pattern)
        elif name in _SCALES:
            self.upstream(node.args[0], pattern, node)
        elif name in ("aten.mul.Tensor", "aten.div.Tensor"):
            self.product(node, pattern)
        elif name == "aten.add.Tensor":
            self.sum(node, pattern)
        else:
            what = f"{name} {node.kwargs['act']}" if "act" in node.kwargs else name or node.op
            raise No("absorbable", f"{node.name} ({what}) cannot take a factor per channel", node)

    def upstream(
        self, value: object, pattern: torch.Tensor, reader: fx.Node, part: int = 0
    ) -> None:
        """Divide the value that ``reader`` reads, where nobody else reads what is divided."""
        if not isinstance(value, fx.Node):
            raise No("absorbable", f"{reader.name} reads the number {value}", reader)
        if sum(a is value for a in reader.args) > 1:
            raise No("all_users_rewritten", f"{reader.name} reads {value.name} twice", reader)
        for user in value.users:
            if user is reader:
                continue
            element = is_element(user) and user.args[1] != part
            if not element and not seen_through(user, value, pattern, part):
                reason = f"{user.name} ({op_name(user) or user.op}) reads {value.name} too"
                raise No("all_users_rewritten", reason, user)
        self.absorb(value, pattern, part)

    def param(
        self, value: object, reader: fx.Node, axis: int, index: torch.Tensor, offset: float = 0.0
    ) -> None:
        """Divide a parameter along one axis; ``offset`` is added to it before it is used."""
        inner = _shifted(value, reader)
        if inner is not None:
            self.param(inner[0], inner[1], axis, index, offset + inner[2])
            return
        found = sole_param(self.program, value, reader)
        if isinstance(found, tuple):
            raise No(found[0], found[1], self.program.node(found[2]))
        index = index.expand(found.shape[axis]).clone()
        self.absorbers.append(Absorber(found.name, axis, index, -1, offset))

    def channel(self, node: fx.Node, pattern: torch.Tensor) -> torch.Tensor:
        """One scale per entry of the last axis; scales along other axes are equated."""
        for a in range(pattern.dim() - 1):
            if pattern.shape[a] > 1:
                found = self.labels.constant_over(pattern, a)
                if found is None:
                    raise No("scaled_whole", f"only a part of {node.name} is rescaled", node)
                pattern = found
        return pattern.flatten()

    def norm(self, node: fx.Node, pattern: torch.Tensor) -> None:
        gain = argument(node, 1, "gain")
        if gain is None:
            raise No("norm_has_gain", f"{node.name} has no gain", node)
        index = self.channel(node, pattern)
        self.param(gain, node, 0, index, float(node.kwargs.get("offset", 0.0)))  # type: ignore[arg-type]
        bias = argument(node, 2, "bias") if op_name(node) == "llmc.layer_norm" else None
        if bias is not None:
            self.param(bias, node, 0, index)

    def linear(self, node: fx.Node, pattern: torch.Tensor) -> None:
        index = self.channel(node, pattern)
        self.param(node.args[1], node, 0, index)
        bias = argument(node, 2, "bias")
        if bias is not None:
            self.param(bias, node, 0, index)

    def attention(self, node: fx.Node, pattern: torch.Tensor) -> None:
        """[B, S, H, E] -> the values [B, KV, T, E]: heads of a group must share their scales."""
        value = node.args[2]
        shape, wide = shape_of(value), shape_of(node)
        if shape is None or wide is None or not only_on(pattern, (2, 3)):
            raise No(
                "absorbable",
                f"{node.name} is rescaled along other axes too",
                node,
            )
        kv, heads, e = as_int(shape[1]), as_int(wide[2]), as_int(wide[3])
        if kv is None or heads is None or e is None:
            raise No("channels_known", f"{node.name} has a symbolic number of heads", node)
        grouped = pattern.expand(1, 1, heads, e).reshape(kv, heads // kv, e)
        shared = self.labels.constant_over(grouped, 1)
        if shared is None:
            raise No("scaled_whole", f"only a part of {node.name} is rescaled", node)
        self.upstream(value, shared.reshape(1, kv, 1, e), node)

    def product(self, node: fx.Node, pattern: torch.Tensor) -> None:
        """A product takes the division in either factor; a parameter is tried first."""
        a, b = node.args[0], node.args[1]
        factors = [a] if op_name(node) == "aten.div.Tensor" else [b, a]
        factors = [f for f in factors if isinstance(f, fx.Node)]
        factors.sort(key=lambda f: f.op != "get_attr")  # type: ignore[union-attr]
        first: No | None = None
        for factor in factors:
            labels, count = self.labels.copy(), len(self.absorbers)
            try:
                self.operand(node, factor, pattern)
                return
            except No as no:
                first = first or no
                self.labels = labels
                del self.absorbers[count:]
        raise first or No("absorbable", f"{node.name} has no factor that is a value", node)

    def sum(self, node: fx.Node, pattern: torch.Tensor) -> None:
        """A sum with a stored bias divides both; a sum of two values is refused."""
        parts = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(parts) == 2 and any(p.op == "get_attr" for p in parts):
            for p in parts:
                self.operand(node, p, pattern)
            return
        raise No("absorbable", f"{node.name} adds two values", node)

    def operand(self, node: fx.Node, operand: object, pattern: torch.Tensor) -> None:
        """Divide one operand of an element-by-element op that broadcasts."""
        shape, wide = shape_of(operand), shape_of(node)
        assert wide is not None
        if shape is None:
            raise No("absorbable", f"{node.name} reads the number {operand}", node)
        extra = len(wide) - len(shape)
        mine = pattern
        if extra > 0 and only_on(pattern, tuple(range(extra, len(wide)))):
            mine = pattern.reshape(pattern.shape[extra:])
        if mine.dim() != len(shape) or any(
            n > 1 and d == 1 for n, d in zip(mine.shape, shape, strict=True)
        ):
            raise No("absorbable", f"{node.name} broadcasts along scaled channels", node)
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            scaled = [a for a, n in enumerate(mine.shape) if n > 1]
            if len(scaled) > 1:
                raise No("absorbable", f"{node.name} reads a parameter with two scaled axes", node)
            axis = scaled[0] if scaled else len(shape) - 1
            self.param(operand, node, axis, mine.flatten())
        else:
            self.upstream(operand, mine, node)


def _shifted(value: object, reader: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(parameter, its reader, number) of a value that is parameter + number and only read here."""
    if op_name(value) not in ("aten.add.Tensor", "aten.add.Scalar"):
        return None
    assert isinstance(value, fx.Node)
    inner, number = value.args[0], value.args[1]
    if isinstance(inner, fx.Node) and isinstance(number, (int, float)) and not value.kwargs:
        return (inner, value, float(number)) if set(value.users) == {reader} else None
    return None


def argument(node: fx.Node, place: int, name: str) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
