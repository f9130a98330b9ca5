"""Weights as a format's codes: what a program's decode steps say, or why no format has a place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.errors import UsageError
from ...ir.graph import Program, info, tensor_type
from ...ir.ops import row_of
from ...ir.ops.compressed import dequantize, groups_of
from ...ir.ops.lookup import lookup
from ...ir.packing import expand_nm, pack, unpack
from ...ir.scheme import Codes, InputGrid

ROUND = "llmc.round_input"
_FLOATS = ("e4m3", "e5m2")
# Steps of a decode that formats of codes have no place for, and what to call them.
_FOREIGN = {
    "llmc.add_csr": "weights kept beside the codes",
    "llmc.expand_bitmap": "a bitmap of kept codes",
    "llmc.sum_signs": "signs and factors",
    "llmc.decode_pairs": "outlier-victim pairs",
    "llmc.decode_scales": "scales that are codes themselves (double)",
    "llmc.decode_bilevel": "scales of two levels (bilevel)",
}
_DECODES = {"llmc.dequantize", "llmc.lookup", *_FOREIGN} - {"llmc.add_csr", "llmc.expand_bitmap"}


@dataclass(frozen=True)
class Grid:
    """What the input of a weight is rounded to, and its static scale: fp32 [1], by parameter."""

    grid: InputGrid
    scale: str | None


@dataclass(frozen=True)
class Parts:
    """Canonical tensors: codes uint8 [N, K], scale [N, G], zero uint8 [N, G] or None."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def dense(self, codes: Codes) -> Tensor:
        """fp32 [N, K], decoded as the program decodes it."""
        columns = self.codes.shape[1]
        how: dict[str, Any] = {"bits": codes.bits, "columns": columns}
        how["group"] = codes.group or columns
        words = pack(self.codes, codes.bits)
        if codes.grid == "uniform":
            return dequantize(words, self.scale, self.zero, **how)
        return lookup(words, self.scale, levels=codes.grid, **how)


@dataclass(frozen=True)
class Coded:
    """One weight [N, K] that is stored as codes.

    Attributes:
        name: in the captured model; path: its module there.
        shape: (N, K). codes: bits, group, grid, symmetry.
        inputs: what it reads is rounded to.
        masked: an n:m mask stood beside the codes; its zeros are kept as codes of 0.
        node: the decoded value. program: that holds it.
    """

    name: str
    path: str
    shape: tuple[int, int]
    codes: Codes
    inputs: Grid | None
    masked: bool
    node: fx.Node
    program: Program

    @property
    def scheme(self) -> tuple[Any, ...]:
        """What weights that an engine fuses must share."""
        c = self.codes
        grid = self.inputs.grid if self.inputs else None
        return (c.bits, c.group, c.grid, c.symmetric, grid)

    @property
    def short(self) -> str:
        """A few characters for tables."""
        return " ".join([self.codes.short, *([self.inputs.grid.short] if self.inputs else [])])

    def refuse(self, field: str, expected: str, found: Any, hint: str) -> UsageError:
        """The error of a field that a format has no place for."""
        return UsageError(
            f"{field}: expected {expected}, found {found}", where=self.path, hint=hint
        )

    def load(self) -> Parts:
        """The tensors; zeros of a mask are codes of 0."""
        mask = self.node if row_of(self.node).name == "llmc.expand_nm" else None
        decode: Any = self.node if mask is None else self.node.args[0]
        given = [self.program.fetch(str(a.target)) for a in decode.args if a is not None]
        bits, columns = self.codes.bits, int(decode.kwargs["columns"])
        q, scale = unpack(given[0], bits, columns), given[1]
        zero = given[2] if len(given) > 2 else None
        if mask is not None:
            # Positions count as kept where the codes that are not 0 land; 0 has a code of its own.
            middle = 0 if self.codes.grid != "uniform" else 1 << (bits - 1)
            which = torch.arange(self.shape[1]) // (self.codes.group or self.shape[1])
            none = torch.full((), middle) if zero is None else zero[:, which].long()
            how: dict[str, Any] = dict(mask.kwargs)
            n, m = how["n"], how["m"]
            meta = self.program.fetch(str(mask.args[1].target))  # type: ignore[union-attr]
            q = expand_nm(q.long() + 1, meta, n, m, self.shape[1])
            q = torch.where(q > 0, q - 1, none).to(torch.uint8)
        return Parts(q, scale, zero)


def without_grids(program: Program) -> tuple[Program, dict[str, Grid]]:
    """A copy whose linears read what comes, and by linear what they read before.

    Raises:
        UsageError: outlier columns stay apart, which no format of codes has a place for.
    """
    out, found = program.clone(), dict[str, Grid]()
    for node in list(out.calls(ROUND)):
        x, scale, columns = [*node.args, None, None][:3]
        how: dict[str, Any] = dict(node.kwargs)
        if columns is not None or how["limit"]:
            raise UsageError(
                "columns: expected one grid for all inputs, found outlier columns kept apart",
                where=info(node).path, hint="w8a8 rounds all of them",
            )  # fmt: skip
        group = int(how["group"]) or None
        grid = InputGrid(how["bits"], how["per"], how["kind"], group, how["power"])
        param = out.param_of(scale)
        for user in node.users:
            found[user.name] = Grid(grid, param.name if param else None)
        assert isinstance(x, fx.Node)
        node.replace_all_uses_with(x)
    out.prune()
    return out, found


def refuse_grids(program: Program, grids: Mapping[str, Grid], hint: str) -> None:
    """For formats of weights alone: UsageError naming the first linear whose inputs are rounded."""
    for name, grid in grids.items():
        raise UsageError(
            f"inputs: expected inputs as they come, found {grid.grid.short}",
            where=info(program.node(name)).path, hint=hint,
        )  # fmt: skip


def coded(
    program: Program, name: str, path: str, node: fx.Node, grids: Mapping[str, Grid]
) -> Coded | None:
    """The weight that a node decodes; None where it is dense.

    Args:
        name: of the captured model's parameter; path: its module. grids: by linear.
    Raises:
        UsageError: codes that formats of codes have no place for; the layer and the field.
    """
    steps = _steps(node)
    if not decodes(node):
        return None
    mask = node if row_of(node).name == "llmc.expand_nm" else None
    decode = node if mask is None else node.args[0]
    for step in sorted(steps & set(_FOREIGN)):
        raise _refusal(path, _FOREIGN[step])
    kind = row_of(decode).name if isinstance(decode, fx.Node) and decode.args else ""
    if kind not in ("llmc.dequantize", "llmc.lookup"):
        made = ", ".join(sorted(steps - _DECODES))
        raise _refusal(path, f"codes that are changed after decoding ({made})")
    assert isinstance(decode, fx.Node)
    how: dict[str, Any] = dict(decode.kwargs)
    grid = "uniform" if kind == "llmc.dequantize" else str(how.get("levels", ""))
    if grid not in ("uniform", *_FLOATS):
        found = f"{grid} levels" if grid else "a table of levels"
        raise _refusal(path, found)
    given = [a for a in decode.args if a is not None]
    if len(given) < 2 or any(program.param_of(a) is None for a in given):
        raise _refusal(path, "scales or codes that are computed")
    rows, columns = map(int, tensor_type(node).shape)
    group = int(how["group"])
    if mask is not None:
        blocks: dict[str, Any] = dict(mask.kwargs)
        group = group * int(blocks["m"]) // int(blocks["n"])
    codes = Codes(
        int(how["bits"]), None if group >= columns else group,
        len(decode.args) < 3 or decode.args[2] is None, grid,
    )  # fmt: skip
    return Coded(name, path, (rows, columns), codes, _read(program, path, node, grids),
                 mask is not None, node, program)  # fmt: skip


def decodes(node: fx.Node) -> bool:
    """Whether a value of parameters is made of codes."""
    return bool(_steps(node) & _DECODES)


def _steps(node: fx.Node) -> set[str]:
    """Names of the ops that make a value of parameters."""
    out, todo = set[str](), [node]
    while todo:
        at = todo.pop()
        if at.op == "call_function":
            out.add(row_of(at).name)
            todo += at.all_input_nodes
    return out


def _read(
    program: Program, path: str, node: fx.Node, grids: Mapping[str, Grid]
) -> Grid | None:  # fmt: skip
    found = {grids.get(u.name) for u in node.users}
    if len(found) > 1:
        raise UsageError("inputs: expected one grid for all that the weight reads, found several",
                         where=path)  # fmt: skip
    return found.pop() if found else None


def _refusal(path: str, found: str) -> UsageError:
    return UsageError(
        f"codes: expected integers or 8-bit floats with a scale per group, found {found}",
        where=path, hint="save an artefact instead, or --format hf writes the weight dense",
    )  # fmt: skip


def groups(weight: Coded) -> int:
    """Scales of a row."""
    return groups_of(weight.shape[1], weight.codes.group or weight.shape[1])
