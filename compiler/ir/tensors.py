"""Laws of packed tensors: word counts, code ranges, mask positions, finite scales.

Layouts are those of :mod:`.packing`; spec/artefact.md describes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx

from . import packing
from .errors import ModelError, VerifierError
from .graph import Program, tensor_type
from .levels import levels
from .ops import row_of
from .ops.pairs import broken_pairs
from .ops.sparse import coordinates

_PARTS = (
    "codes", "scale", "zero", "meta", "bitmap", "values", "index", "starts", "table", "signs",
    "factors", "step", "mean", "scale_codes", "outliers", "low", "order", "turn",
)  # fmt: skip
LOOKUP = "llmc.lookup"
_ARGUMENTS = {
    "llmc.dequantize": ("codes", "scale", "zero"),
    "llmc.lookup": ("codes", "scale", "table"),
    "llmc.decode_pairs": ("codes", "scale"),
    "llmc.sum_signs": ("signs", "factors"),
    "llmc.decode_scales": ("scale_codes", "step", "mean"),
    "llmc.decode_bilevel": ("codes", "step", "low"),
    "llmc.expand_nm": ("values", "meta"),
    "llmc.expand_bitmap": ("values", "bitmap"),
    "llmc.add_csr": ("", "values", "index", "starts"),
    "llmc.csr_linear": ("", "", "values", "index", "starts"),
    "llmc.round_input": ("", "scale", "outliers"),
    "llmc.tt_lookup": ("", "scale", "order"),
    "llmc.tt_linear": ("", "scale", "order"),
    "llmc.rotate": ("", "turn"),
}
"""Names of the leading arguments of the ops that read packed tensors."""


@dataclass(frozen=True)
class Packed:
    """One call that reads packed parameters: their tensors by argument name, and its attributes."""

    node: fx.Node
    tensors: dict[str, torch.Tensor]
    attrs: dict[str, Any]


def packed_calls(program: Program) -> Iterator[Packed]:
    """Calls of ops over packed tensors, with those of their arguments that are parameters.

    Raises:
        VerifierError: a tensor that cannot be loaded.
    """
    for node in program.calls():
        if row_of(node).name not in _ARGUMENTS:
            continue
        given = _given(node)
        tensors: dict[str, torch.Tensor] = {}
        for part in _PARTS:
            param = program.param_of(given.get(part))
            if param is not None:
                try:
                    tensors[part] = program.weights.load(param.name)
                except ModelError as e:
                    _fail("stored", e.message, node)
        yield Packed(node, tensors, {k: v for k, v in node.kwargs.items() if isinstance(v, int)})


def _given(node: fx.Node) -> dict[str, Any]:
    names = _ARGUMENTS[row_of(node).name]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _fail(rule: str, message: str, node: fx.Node) -> NoReturn:
    raise VerifierError(rule, message, node=node.name)


def _stored(program: Program) -> None:
    """A stored tensor has the shape and dtype of its parameter's row."""
    for node in program.graph.nodes:
        param = program.param_of(node)
        if param is None or not any(row_of(u).name in _ARGUMENTS for u in node.users):
            continue
        try:
            t = program.weights.load(param.name)
        except ModelError as e:
            _fail("stored", e.message, node)
        if tuple(t.shape) != param.shape or t.dtype != param.dtype:
            want = f"{param.dtype} {list(param.shape)}"
            _fail("stored", f"expected {want}, found {t.dtype} {list(t.shape)}", node)


def _kept_columns(p: Packed) -> int:
    columns, n, m = (int(p.attrs.get(k, 0)) for k in ("columns", "n", "m"))
    # dequantize counts the columns that it decodes, the others those of the whole weight.
    return columns // m * n if m else columns


def _words(program: Program) -> None:
    """Rows have as many words as their columns take, and the bits past the end are zero."""
    for p in packed_calls(program):
        m = int(p.attrs.get("m", 0))
        widths = {
            "codes": (int(p.attrs.get("bits", 0)), _kept_columns(p)),
            "meta": (packing.nm_bits(m) if m else 0, _kept_columns(p)),
            "bitmap": (1, int(p.attrs.get("columns", 0))),
            "signs": (1, int(p.attrs.get("columns", 0))),
        }
        for part, (bits, columns) in widths.items():
            t = p.tensors.get(part)
            if t is None:
                continue
            if not 1 <= bits <= 8:
                _fail("words", f"expected 1 to 8 bits, found {bits}", p.node)
            want = packing.packed_words(columns, bits)
            if t.dtype != torch.int32 or t.shape[-1] != want:
                _fail(
                    "words", f"expected {want} int32 words of {part}, found {t.shape[-1]}", p.node
                )
            used = columns * bits % 32
            if (
                used
                and t.numel()
                and bool(((t[..., -1].to(torch.int64) & 0xFFFFFFFF) >> used).any())
            ):
                _fail("words", f"expected zero bits past column {columns} of {part}", p.node)


def _scales(program: Program) -> None:
    """Scales, tables, factors and what scales are made of are finite floats."""
    for p in packed_calls(program):
        for part in ("scale", "table", "factors", "step", "mean", "low"):
            t = p.tensors.get(part)
            if t is not None and not (t.is_floating_point() and bool(torch.isfinite(t).all())):
                _fail("scale", f"expected a finite {part}, found inf, nan or integers", p.node)


def _values(program: Program) -> None:
    """Each code stands for a level: none for inf, nan or nothing."""
    for p in packed_calls(program):
        name, t = p.node.kwargs.get("levels"), p.tensors.get("codes")
        if not isinstance(name, str) or not name or t is None or row_of(p.node).name != LOOKUP:
            continue
        bits, columns = int(p.attrs["bits"]), int(p.attrs["columns"])
        empty = torch.isnan(levels(name, bits)).to(t.device)
        if not bool(empty.any()):
            continue
        found = empty[packing.unpack(t, bits, columns).long()]
        if bool(found.any()):
            why = f"expected codes of {name} levels, found {int(found.sum())} that stand for none"
            _fail("level", why, p.node)


def _pairs(program: Program) -> None:
    """Of two neighbours at most one is a victim, and the other is an outlier."""
    for p in packed_calls(program):
        t = p.tensors.get("codes")
        if t is not None and row_of(p.node).name == "llmc.decode_pairs":
            found = broken_pairs(t, int(p.attrs["bits"]), int(p.attrs["columns"]))
            if found:
                why = f"expected pairs with an outlier or none, found {found} broken ones"
                _fail("level", why, p.node)


def _zeros(program: Program) -> None:
    """A zero point is itself a code."""
    for p in packed_calls(program):
        t, bits = p.tensors.get("zero"), int(p.attrs.get("bits", 0))
        if t is None or not t.numel():
            continue
        if t.dtype != torch.uint8 or int(t.max()) >= 1 << bits:
            _fail(
                "zero", f"expected u8 zero points below {1 << bits}, found {int(t.max())}", p.node
            )


def _positions(program: Program) -> None:
    """Kept positions of an n:m mask ascend strictly inside each block and lie below m."""
    for p in packed_calls(program):
        t = p.tensors.get("meta")
        if t is None:
            continue
        n, m = int(p.attrs["n"]), int(p.attrs["m"])
        if not 1 <= n <= m:
            _fail("mask", f"expected n of m with 1 ≤ n ≤ m, found {n}:{m}", p.node)
        where = packing.unpack(t, packing.nm_bits(m), _kept_columns(p)).to(torch.int16)
        blocks = where.unflatten(-1, (-1, n))
        if where.numel() and int(where.max()) >= m:
            _fail("mask", f"expected positions below {m}, found {int(where.max())}", p.node)
        if bool((blocks[..., 1:] <= blocks[..., :-1]).any()):
            _fail("mask", f"expected {n} ascending positions in each block of {m}", p.node)


def _counts(program: Program) -> None:
    """A bitmap has one set bit for each stored value."""
    for p in packed_calls(program):
        bitmap, values = p.tensors.get("bitmap"), p.tensors.get("values")
        if bitmap is None or values is None:
            continue
        kept = int(packing.unpack(bitmap, 1, int(p.attrs["columns"])).sum(dtype=torch.int64))
        if kept != values.numel():
            _fail("count", f"expected {kept} values for the bitmap, found {values.numel()}", p.node)


def _columns_of(p: Packed) -> int:
    weight = p.node if row_of(p.node).name == "llmc.add_csr" else p.node.args[1]
    assert isinstance(weight, fx.Node)
    return int(tensor_type(weight).shape[-1])


def _rows(program: Program) -> None:
    """Sparse rows begin at 0, never end before they begin, and together hold every value."""
    for p in packed_calls(program):
        starts, values = p.tensors.get("starts"), p.tensors.get("values")
        if starts is None or values is None:
            continue
        if int(starts[0]) or int(starts[-1]) != len(values) or bool((starts.diff() < 0).any()):
            why = f"expected rows that share out {len(values)} values, found {starts.tolist()[:8]}"
            _fail("rows", why, p.node)


def _index(program: Program) -> None:
    """The columns of a sparse row ascend strictly and lie inside the matrix."""
    for p in packed_calls(program):
        index, starts, columns = p.tensors.get("index"), p.tensors.get("starts"), 0
        if index is None or starts is None or not len(index):
            continue
        columns = _columns_of(p)
        if int(index.min()) < 0 or int(index.max()) >= columns:
            why = (
                f"expected columns in [0, {columns}), found {int(index.min())}, {int(index.max())}"
            )
            _fail("index", why, p.node)
        rows, at = coordinates(index, starts)
        if bool(((rows * columns + at).diff() <= 0).any()):
            _fail("index", "expected ascending columns in each row, each once", p.node)


def _disjoint(program: Program) -> None:
    """A sparse part holds no weight that an n:m part beside it keeps, but where that is a code:
    blocks of outliers alone keep n of them, whose codes are then below what is added."""
    for p in packed_calls(program):
        index, starts, base = p.tensors.get("index"), p.tensors.get("starts"), p.node.args[0]
        if index is None or starts is None or not isinstance(base, fx.Node):
            continue
        masked = base.op == "call_function" and row_of(base).name == "llmc.expand_nm"
        param = program.param_of(base.args[1]) if masked else None
        if param is None or program.param_of(base.args[0]) is None:
            continue
        n, m, columns = (int(str(base.kwargs[k])) for k in ("n", "m", "columns"))
        meta = program.weights.load(param.name)
        kept = torch.ones(meta.shape[0], columns // m * n, dtype=torch.bool, device=meta.device)
        if bool(packing.expand_nm(kept, meta, n, m, columns)[coordinates(index, starts)].any()):
            _fail("disjoint", f"expected entries that {base.name} drops, found kept ones", p.node)


def _rounding(program: Program) -> None:
    """Input grids have positive scales; outlier columns ascend strictly and are columns of x."""
    for p in packed_calls(program):
        if row_of(p.node).name != "llmc.round_input":
            continue
        scale, columns, x = p.tensors.get("scale"), p.tensors.get("outliers"), p.node.args[0]
        if scale is not None and scale.numel() and float(scale.min()) <= 0:
            _fail("scale", f"expected positive scales, found {float(scale.min())}", p.node)
        if columns is None or not columns.numel():
            continue
        assert isinstance(x, fx.Node)
        width, wide = int(tensor_type(x).shape[-1]), columns.to(torch.int64)
        if int(wide.min()) < 0 or int(wide.max()) >= width or bool((wide.diff() <= 0).any()):
            why = f"expected ascending columns in [0, {width}), found {wide.tolist()[:8]}"
            _fail("columns", why, p.node)


def _turns(program: Program) -> None:
    """A rotation loses nothing: integers are signs, floats finite and not 0."""
    for p in packed_calls(program):
        t = p.tensors.get("turn", p.tensors.get("scale"))
        if t is None or row_of(p.node).name != "llmc.rotate":
            continue
        size = t.abs() if t.is_floating_point() else (t.to(torch.int64).abs() == 1).float()
        if not bool(torch.isfinite(size).all()) or float(size.min()) <= 0:
            _fail("scale", "expected signs or scales that are finite and not 0", p.node)


def _trains(program: Program) -> None:
    """Cores of tensor trains are finite; places of tokens are distinct rows of the table."""
    for p in packed_calls(program):
        if row_of(p.node).name not in ("llmc.tt_lookup", "llmc.tt_linear"):
            continue
        for core in p.node.args[3]:  # type: ignore[union-attr]
            param = program.param_of(core)
            held = program.weights.load(param.name) if param is not None else torch.zeros(())
            if not bool(torch.isfinite(held).all()):
                assert param is not None
                _fail("train", f"expected finite cores, found NaN or Inf in {param.name}", p.node)
        order = p.tensors.get("order")
        if order is None:
            continue
        rows = math.prod(p.node.kwargs["rows"])  # type: ignore[arg-type]
        found = order.unique()
        if int(found[0]) < 0 or int(found[-1]) >= rows or len(found) < len(order):
            _fail("train", f"expected distinct places in [0, {rows}), found others", p.node)


TENSOR_RULES: list[tuple[str, Callable[[Program], None]]] = [
    ("stored", _stored),
    ("words", _words),
    ("scale", _scales),
    ("zero", _zeros),
    ("level", _values),
    ("level", _pairs),
    ("mask", _positions),
    ("count", _counts),
    ("rows", _rows),
    ("index", _index),
    ("disjoint", _disjoint),
    ("rounding", _rounding),
    ("train", _trains),
    ("turns", _turns),
]
"""The laws of packed tensors, in order."""
