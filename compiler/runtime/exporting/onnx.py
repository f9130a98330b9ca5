"""``onnx`` and ``onnx-qdq``: the whole model as one ONNX graph, codes packed.

``onnx`` multiplies by com.microsoft.MatMulNBits, which onnxruntime serves by kernels of its own;
``onnx-qdq`` by the standard's DequantizeLinear on 4-bit integers (opset 21) before a MatMul.
accuracy_level is written as 1, so that inputs are never rounded; of DequantizeLinear a session
decides, see the note in the record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.errors import GateError, ResourceError, UsageError
from ...ir.graph import Program, info
from ...ir.types import short
from ..artefact import versions
from ..files import canonical_json, new_folder
from .codes import Coded, coded, refuse_grids, without_grids
from .exported import TOLERANCE, compare, exported, quiet
from .job import OVERHEAD, RECORD, Job
from .onnx_data import check_data
from .onnx_ops import ACCURACY, OPSET, product
from .onnx_pack import Packed, check_weight, pack

FILE = "model.onnx"
# It names packages that are not needed here.
_EXPORTER = "torch.onnx._internal.exporter._registration"
SESSION_KEY = "session.qdq_matmulnbits_accuracy_level"


def write(job: Job) -> dict[str, Any]:
    """Write a job as ONNX.

    Returns:
        Its record, see :func:`..export.export`.
    Raises:
        UsageError: codes that the format has no place for, the layer and the field named, or a
        dtype. ResourceError: onnx or onnxscript is missing. GateError: onnxruntime, where it is
        installed, gives other logits; nothing is left.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ResourceError("expected the packages onnx and onnxscript, found none",
                            hint="pip install onnx onnxscript") from error  # fmt: skip
    if job.dtype not in (None, torch.float32):
        raise UsageError(f"--dtype: expected f32, found {short(job.dtype)}",
                         hint="the graph computes in f32")  # fmt: skip
    plain, grids = without_grids(job.program)
    refuse_grids(plain, grids, "--format compressed-tensors holds w8a8")
    standard = job.format == "onnx-qdq"
    weights = coded_linears(plain)
    for weight in weights.values():
        check_weight(weight, standard)
    stored = sum(plain.stored_bytes().values())
    with new_folder(job.folder, needed=5 * stored + OVERHEAD, force=job.force) as out:
        job.tell("exporting the graph")
        packed = {name: pack(w) for name, w in weights.items()}
        made = exported(plain, _products(packed))
        job.tell("writing it as ONNX")
        with quiet(_EXPORTER):
            graph = torch.onnx.export(
                made, (), dynamo=True, opset_version=OPSET, optimize=True, verbose=False,
                input_names=[n.name for n in plain.inputs],
                output_names=["logits"],
            )  # fmt: skip
        assert graph is not None
        model = graph.model_proto
        model.ir_version = 10
        if standard:
            from .onnx_pack import to_standard

            to_standard(model)
        # Weights beside the graph: one file of at most two gigabytes is all that protobuf takes.
        onnx.save(model, str(out.path / FILE), save_as_external_data=True,
                  location=FILE + ".data", size_threshold=1024)  # fmt: skip
        job.tell("reading it back and comparing logits")
        apart, told = check(plain, out.path, standard)
        files = [p for p in out.path.iterdir() if p.name.startswith(FILE)]
        record = {
            "format": job.format,
            "architecture": str(plain.facts.get("architecture", "program")),
            "dtype": "f32", "bytes": sum(p.stat().st_size for p in files), "left_out": [],
            "difference": apart, "rounding": 0.0, "tolerance": TOLERANCE, "versions": versions(),
            "quantised": len(weights), "schemes": _count(weights), "opset": OPSET,
            "accuracy_level": None if standard else ACCURACY,
            "dense": [info(n).path for n in plain.calls("aten.linear.default")
                      if n.name not in weights],
            "notes": [*told, "without a KV cache: all tokens at once"],
        }  # fmt: skip
        out.write(RECORD, canonical_json(record))
        out.adopt()
    return record


def coded_linears(program: Program) -> dict[str, Coded]:
    """By name of the linear, the weight of codes that it reads."""
    found = {}
    for node in program.calls("aten.linear.default"):
        weight = node.args[1]
        if isinstance(weight, fx.Node) and weight.op == "call_function":
            path = info(node).path
            one = coded(program, path, path, weight, {})
            if one is not None:
                found[node.name] = one
    return found


def _count(weights: dict[str, Coded]) -> dict[str, int]:
    out: dict[str, int] = {}
    for w in weights.values():
        out[w.short] = out.get(w.short, 0) + 1
    return out


def _products(packed: dict[str, Packed]) -> Any:
    """Put one product of packed codes in the place of a linear and what decodes its weight."""

    def instead(
        graph: fx.Graph, root: torch.nn.Module, node: fx.Node, made: dict[fx.Node, fx.Node]
    ) -> fx.Node | None:
        if node.op != "call_function" or node.name not in packed:
            return None
        p = packed[node.name]
        names: list[fx.Node | None] = []
        for part in ("codes", "scale", "zero"):
            tensor: Tensor | None = getattr(p, part)
            if tensor is not None:
                root.register_buffer(f"{node.name}_{part}", tensor)
                names.append(graph.get_attr(f"{node.name}_{part}"))
            else:
                names.append(None)
        x = node.args[0]
        assert isinstance(x, fx.Node)
        y = graph.call_function(product, (made[x], *names, p.rows, p.columns, p.bits, p.block))
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if isinstance(bias, fx.Node):
            y = graph.call_function(torch.ops.aten.add.Tensor, (y, made[bias]))
        return y

    return instead


def check(program: Program, folder: Path, standard: bool) -> tuple[float | None, list[str]]:
    """Check the graph by onnx, and compare logits by onnxruntime where it is installed.

    Returns:
        The largest difference of a logit, None where nothing could run it; and notes.
    Raises:
        ModelError: weights beside the graph that are not in its folder. GateError: onnx refuses
        the graph, or other logits.
    """
    import onnx

    path = folder / FILE
    check_data(path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise GateError(f"expected a graph that onnx accepts, found {str(error)[:200]}") from error
    told = []
    if standard:
        told.append(f"onnxruntime rounds inputs to 8 bits unless {SESSION_KEY} is '1'")
    try:
        import onnxruntime
    except ImportError:
        return None, [*told, "not run: onnxruntime is not installed"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if standard:
        options.add_session_config_entry(SESSION_KEY, "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}

    def run(inputs: dict[str, Tensor]) -> Tensor:
        given = {n: t.numpy() for n, t in inputs.items() if n in wanted}
        return torch.from_numpy(session.run(None, given)[0])

    return compare(program, run), told
