"""How a weight's scheme becomes graph and tensors: the decode steps and their packed parameters.

The graph half runs while planning, with shapes alone; the tensor half runs after the solve. The two
must agree byte for byte, and :func:`tensors` checks that decoding gives the solved weight exactly.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..ir import packing
from ..ir.build import result_type
from ..ir.errors import LlmcError, ModelError
from ..ir.graph import Param, Program, info, tensor_type
from ..ir.ops.base import infer, row_of
from ..ir.ops.sparse import add_csr, csr, index_dtype
from ..ir.scheme import Codes, Mask, Scheme, Sparse
from ..ir.types import same_type
from ..solvers import Solution
from ..solvers.masks import recover_bound
from ..solvers.outliers import outlier_count
from . import decoding

SPARSE = ("extra", "index", "starts")
"""Parts of a weight's sparse rows: values, columns, where each row starts."""
_SUFFIXES = ("values", "meta", "bitmap", *decoding.SUFFIXES, *SPARSE)
"""Ends of the names of a weight's packed parts."""


def reader_of(program: Program, node: str, slot: int, made_by: str) -> fx.Node:
    """The call that reads a weight as one matrix: the linear, or what stacks experts' rows.

    The stacked parameter [E, R, C] of an experts call becomes [E·R, C], to be packed so.
    """
    call = program.node(node)
    if slot == 1:
        return call
    stack = call.args[slot]
    assert isinstance(stack, fx.Node)
    param = program.param_of(stack)
    if param is None:
        return stack
    flat = replace(param, shape=(param.shape[0] * param.shape[1], param.shape[2]))
    program.params[param.name] = flat
    stack.meta["llmc"] = replace(info(stack), type=program.param_type(flat))
    where: dict[str, Any] = {"before": call, "made_by": made_by, "like": call}
    new = program.emit("aten.reshape.default", stack, list(param.shape), **where)
    call.replace_input_with(stack, new)
    return new


def _stacked(reader: fx.Node, slot: int) -> int:
    """How many matrices, each solved alone, the reader's one is."""
    return 1 if slot == 1 else int(tensor_type(reader).shape[0])


def matrix_of(reader: fx.Node) -> Any:
    """What a reader takes for its weight, [out, in]."""
    return reader.args[1 if row_of(reader).name == "aten.linear.default" else 0]


def _weight_of(program: Program, linear: fx.Node) -> tuple[fx.Node, Param, str]:
    """The reader's weight argument, the parameter that it decodes from, and its base name."""
    weight = matrix_of(linear)
    if not isinstance(weight, fx.Node):
        raise ModelError("expected a weight value", where=f"node {linear.name}")
    source = weight
    while source.op == "call_function":
        source = source.all_input_nodes[0]
    param = program.params[str(source.target)]
    return weight, param, _base(param.name)


def _base(name: str) -> str:
    """The weight's name behind that of one of its packed parts."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(f".{suffix}")
    return name


def _columns(node: fx.Node) -> int:
    return int(info(node).type.shape[-1])  # type: ignore[union-attr]


def _new(
    program: Program, param: Param, before: fx.Node, linear: fx.Node, made_by: str,
    name: str, shape: tuple[int, ...], dtype: torch.dtype, keep: bool = True,
) -> fx.Node:  # fmt: skip
    """A piece of a weight: named after the weight, placed and made as the linear is rewritten."""
    suffix = name.rsplit(".", 1)[1]
    names = tuple(f"{_base(n)}.{suffix}" for n in param.names)
    piece = Param(name, shape, dtype, names, trained=True, keep=keep)
    return program.add_param(piece, None, before=before, made_by=made_by, like=linear)


def encode_mask(
    program: Program, node: str, mask: Mask, *, made_by: str, slot: int = 1
) -> list[str]:
    """Rewrite linear(x, W) to read kept values and their places; return the new parameters.

    slot: which argument of the call W is; experts stack theirs.
    """
    linear = reader_of(program, node, slot, made_by)
    weight, param, base = _weight_of(program, linear)
    rows, columns = param.shape
    new_piece = partial(_new, program, param, linear, linear, made_by)
    if mask.structured:
        kept = columns // mask.m * mask.n
        words = packing.packed_words(kept, packing.nm_bits(mask.m))
        values = new_piece(f"{base}.values", (rows, kept), param.dtype, False)
        meta = new_piece(f"{base}.meta", (rows, words), torch.int32)
        new = program.emit(
            "llmc.expand_nm", values, meta, n=mask.n, m=mask.m, columns=columns,
            before=linear, made_by=made_by, like=linear,
        )  # fmt: skip
        made = [f"{base}.values", f"{base}.meta"]
    else:
        experts = _stacked(linear, slot)
        kept = experts * kept_count(rows // experts * columns, mask.sparsity)
        words = packing.packed_words(columns, 1)
        values = new_piece(f"{base}.values", (kept,), param.dtype, False)
        bitmap = new_piece(f"{base}.bitmap", (rows, words), torch.int32)
        new = program.emit(
            "llmc.expand_bitmap", values, bitmap, columns=columns,
            before=linear, made_by=made_by, like=linear,
        )  # fmt: skip
        made = [f"{base}.values", f"{base}.bitmap"]
    linear.replace_input_with(weight, new)
    program.prune(weight)
    return made


def encode_sparse(
    program: Program, node: str, mask: Mask, sparse: Sparse, bound: bool, *, made_by: str,
    slot: int = 1,
) -> list[str]:  # fmt: skip
    """Let linear(x, W) read W + S, S the dropped weights that come back; after `encode_mask`.

    How many come back is known after the solve; the planned sizes are a bound. ``bound``: mask and
    S rank by one score, which makes it tighter.
    """
    linear = reader_of(program, node, slot, made_by)
    rows, columns = _shape(matrix_of(linear))
    count = rows * recover_bound(sparse.share, mask.n, mask.m, columns, bound)
    return _beside(program, linear, count, made_by)


def encode_outliers(
    program: Program, node: str, sparse: Sparse, *, made_by: str, slot: int = 1
) -> list[str]:
    """Let linear(x, W) read W + S, S the weights that stay off the grid; before `encode_codes`."""
    linear = reader_of(program, node, slot, made_by)
    rows, columns = _shape(matrix_of(linear))
    experts = _stacked(linear, slot)
    count = experts * outlier_count(sparse.share, rows // experts * columns)
    return _beside(program, linear, count, made_by)


def _shape(weight: Any) -> tuple[int, int]:
    rows, columns = info(weight).type.shape  # type: ignore[union-attr]
    return int(rows), int(columns)


def _beside(program: Program, linear: fx.Node, count: int, made_by: str) -> list[str]:
    """Put sparse rows with room for ``count`` weights beside the weight of a linear."""
    weight, param, base = _weight_of(program, linear)
    rows, columns = _shape(weight)
    new_piece = partial(_new, program, param, linear, linear, made_by)
    values = new_piece(f"{base}.extra", (count,), param.dtype, False)
    index = new_piece(f"{base}.index", (count,), index_dtype(columns))
    starts = new_piece(f"{base}.starts", (rows + 1,), torch.int32)
    new = program.emit(
        "llmc.add_csr", weight, values, index, starts,
        before=linear, made_by=made_by, like=linear,
    )  # fmt: skip
    linear.replace_input_with(weight, new)
    return [f"{base}.{part}" for part in SPARSE]


def kept_count(total: int, sparsity: float) -> int:
    """Weights that stay of ``total``; what a solver rounds per block may differ by a few."""
    return total - round(total * sparsity)


def encode_codes(
    program: Program, node: str, codes: Codes, *, made_by: str, slot: int = 1
) -> list[str]:
    """Rewrite linear(x, W) or linear(x, expand_nm(values, meta)) to read packed codes.

    Sparse rows beside the weight stay as they are.
    """
    linear = reader_of(program, node, slot, made_by)
    weight, param, base = _weight_of(program, linear)
    rows, reader = _shape(weight)[0], linear
    if weight.op == "call_function" and row_of(weight).name == "llmc.add_csr":
        reader, weight = weight, weight.args[0]  # type: ignore[assignment]
    expand = weight if weight.op == "call_function" else None
    columns, group = _columns(weight), codes.group
    if expand is not None and "m" in expand.kwargs:
        n, m = int(expand.kwargs["n"]), int(expand.kwargs["m"])  # type: ignore[arg-type]
        columns = columns // m * n
        group = None if group is None else group // m * n
        old = expand.args[0]
        before = expand
    else:
        # Without blocks of fixed count, codes stay dense and a masked one sits at the zero point.
        old, before = weight, reader
    assert isinstance(old, fx.Node)
    made: list[str] = []

    def new_piece(suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        made.append(f"{base}.{suffix}")
        return _new(program, param, before, linear, made_by, made[-1], shape, dtype)

    new = decoding.emit(
        program, codes, new_piece, rows, columns, group or columns,
        before=before, made_by=made_by, like=linear,
    )  # fmt: skip
    before.replace_input_with(old, new)
    program.prune(old)
    return made


def tensors(
    base: str, scheme: Scheme, solution: Solution, stored: torch.dtype
) -> dict[str, Tensor]:
    """The packed parameters of one solved weight, by parameter name.

    Raises:
        LlmcError: decoding them does not give the solved weight bit for bit.
    """
    codes, mask = scheme.codes, scheme.mask
    out: dict[str, Tensor] = {}
    sparse: tuple[Tensor, ...] = ()
    if scheme.sparse is not None:
        if solution.extra is None:
            raise LlmcError(f"expected sparse weights from the solver, found none for {base}")
        beside = solution.weight if solution.under is None else solution.weight - solution.under
        sparse = (beside[solution.extra].to(stored), *csr(solution.extra))
        out.update({f"{base}.{part}": t for part, t in zip(SPARSE, sparse, strict=True)})
    if codes is None:
        if mask is None or solution.mask is None:
            return {base: solution.weight.to(stored)}
        weight = solution.weight.to(stored)
        if mask.structured:
            values, meta = packing.compress_nm(weight, solution.mask, mask.n, mask.m)
            return out | {f"{base}.values": values, f"{base}.meta": meta}
        bitmap = packing.pack(solution.mask.to(torch.uint8), 1)
        return {f"{base}.values": weight[solution.mask], f"{base}.bitmap": bitmap}
    if solution.codes is None:
        raise LlmcError(f"expected codes from the solver, found none for {base}")
    q, columns, group = solution.codes, solution.codes.shape[1], codes.group
    if mask is not None and mask.structured:
        if solution.mask is None:
            raise LlmcError(f"expected a mask from the solver, found none for {base}")
        q, out[f"{base}.meta"] = packing.compress_nm(q, solution.mask, mask.n, mask.m)
        columns, group = q.shape[1], None if group is None else group // mask.m * mask.n
    parts = decoding.pieces(codes, q, solution)
    out.update({f"{base}.{suffix}": t for suffix, t in parts.items()})
    back = decoding.decoded(codes, parts, len(q), columns, group or columns)
    if mask is not None and mask.structured:
        width = solution.weight.shape[1]
        back = packing.expand_nm(back, out[f"{base}.meta"], mask.n, mask.m, width)
    if sparse:
        back = add_csr(back, sparse[0].to(back.dtype), *sparse[1:])
    if not torch.equal(back, solution.weight):
        raise LlmcError(f"expected codes of {base} to give the solved weight exactly, they do not")
    return out


def refresh_types(program: Program) -> None:
    """Re-derive types after tensors were set (an unstructured count may differ).

    Raises:
        ModelError: tensors that do not fit together.
    """
    changed: set[fx.Node] = set()
    for node in program.graph.nodes:
        kind = info(node).type
        if node.op == "get_attr":
            kind = program.param_type(program.params[str(node.target)])
        elif node.op == "call_function" and not changed.isdisjoint(node.all_input_nodes):
            kind = infer(node)
        elif node.op == "output":
            kind = result_type(node.args[0])
        if not same_type(kind, info(node).type):
            changed.add(node)
            node.meta["llmc"] = replace(info(node), type=kind)
