"""Coded linears in a captured program: weights become decode steps of packed parameters."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import fx

from ...ir.errors import ModelError
from ...ir.graph import Param, Program, info
from ...ir.ops import row_of
from ..sources import Leaf, LeafWeights
from .base import Layer

_ROUND = "llmc.round_input"


def attach(program: Program, layers: Mapping[str, Layer], made_by: str) -> None:
    """Let the program read codes instead of the weights of coded linears, in place.

    Args:
        layers: by the model's name of the weight; the program reads it as a dense parameter.
        made_by: the format's name, for provenance.
    Raises:
        ModelError: a weight that is read otherwise than the format means.
    """
    by_name = {name: p for p in program.params.values() for name in p.names}
    for name, layer in layers.items():
        if name in by_name:
            _Weight(program, by_name[name], layer, made_by).attach()


class _Weight:
    def __init__(self, program: Program, param: Param, layer: Layer, made_by: str) -> None:
        self.program, self.param, self.layer, self.made_by = program, param, layer, made_by

    def attach(self) -> None:
        node = self.program.param_node(self.param.name)
        readers = list(node.users)
        if not readers:
            return
        *rows, columns = self.param.shape
        if (prod(rows), columns) != self.layer.shape or len(rows) > 2:
            want, have = list(self.layer.shape), list(self.param.shape)
            raise ModelError(f"expected {self.layer.path!r} read as {want}, found {have}")
        first = min(readers)
        new = self._decode(first)
        if len(rows) == 2:
            where: dict[str, Any] = {"before": first, "made_by": self.made_by, "like": first}
            new = self.program.emit("aten.reshape.default", new, list(self.param.shape), **where)
        node.replace_all_uses_with(new)
        for reader in sorted(readers):
            self._reads(reader, new)
        self.program.prune(node)
        assert isinstance(self.program.weights, LeafWeights)
        self.program.weights.leaves.pop(self.param.name, None)

    def _decode(self, before: fx.Node) -> fx.Node:
        codes, columns = self.layer.codes, self.layer.shape[1]
        names = ["codes", "scale", *(["zero"] if "zero" in self.layer.pieces else [])]
        given = [self._piece(name, before) for name in names]
        how: dict[str, Any] = {
            "bits": codes.bits, "group": codes.group or columns, "columns": columns,
            "dtype": self.program.dtype, "before": before, "made_by": self.made_by, "like": before,
        }  # fmt: skip
        if codes.grid == "uniform":
            return self.program.emit("llmc.dequantize", *given, **how)
        return self.program.emit("llmc.lookup", *given, levels=codes.grid, **how)

    def _piece(self, name: str, before: fx.Node) -> fx.Node:
        piece, weights = self.layer.pieces[name], self.program.weights
        assert isinstance(weights, LeafWeights)
        param = Param(f"{self.param.name}.{name}", piece.shape, piece.dtype,
                      tuple(f"{n}.{name}" for n in self.param.names), keep=True)  # fmt: skip
        load = _checked(piece.load, piece.shape, param.names[0])
        leaf = Leaf(param.names, piece.shape, piece.dtype, load, keep=True)
        weights.leaves[param.name] = leaf
        return self.program.add_param(param, None, before=before, made_by=self.made_by, like=before)

    def _reads(self, reader: fx.Node, weight: fx.Node) -> None:
        """Round and reorder what a linear reads, where the format says so."""
        layer = self.layer
        if layer.inputs is None and "order" not in layer.pieces:
            return
        linear = reader.op == "call_function" and row_of(reader).name == "aten.linear.default"
        x = reader.args[0]
        if not linear or reader.args[1] is not weight or not isinstance(x, fx.Node):
            raise ModelError(f"expected {layer.path!r} read by a linear, found {reader.name}",
                             where=info(reader).path)  # fmt: skip
        where: dict[str, Any] = {"before": reader, "made_by": self.made_by, "like": reader}
        if layer.inputs is not None:
            x = self._rounded(x, reader, where)
        if "order" in layer.pieces:
            order = self._piece("order", reader)
            x = self.program.emit("aten.index_select.default", x, -1, order, **where)
        reader.args = (x, *reader.args[1:])

    def _rounded(self, x: fx.Node, reader: fx.Node, where: Mapping[str, Any]) -> fx.Node:
        grid = self.layer.inputs
        assert grid is not None
        how: dict[str, Any] = {
            "kind": grid.kind, "bits": grid.bits, "per": grid.per, "group": 0, "power": False,
            "limit": 0.0,
        }  # fmt: skip
        for user in x.users:
            shared = user.op == "call_function" and row_of(user).name == _ROUND
            if shared and not grid.static and user.kwargs == how and user < reader:
                return user
        scale = self._piece("in_scale", reader) if grid.static else None
        return self.program.emit(_ROUND, x, scale, None, **how, **where)


def _checked(load: Any, shape: tuple[int, ...], name: str) -> Any:
    """A load whose result has the shape that the header promised."""

    def checked() -> Any:
        tensor = load()
        if tuple(tensor.shape) != shape:
            raise ModelError(f"expected {name!r} {list(shape)}, found {list(tensor.shape)}")
        return tensor

    return checked
