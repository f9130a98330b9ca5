"""The table of methods on one reproducible layer, by the real passes.

The layer stands in a program of its own: tokens pick the rows of X, a gain of ones stands where a
norm would, so that scales have a place to go, and W reads the product. What W's linear gives, with
everything that a method put beside it, is compared with X Wᵀ over all rows of X, which are the
calibration data too. W is stored in 16 bits, as a checkpoint would.
"""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import torch
from method_rows import Row
from torch import Tensor

from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.errors import LlmcError
from llmc.compiler.ir.graph import Param, Program
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.segments import make_segments
from llmc.compiler.pipeline.compile import Compiled, compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.zoo import Builder
from llmc.compiler.report.data import report

END = "llmc.activation"
LENGTH = 128


def layer_program(w: Tensor, x: Tensor) -> Program:
    """A program that reads tokens, X [tokens, n] row by row, and W [m, n] behind a gain."""
    b = Builder()
    ids = b.input("input_ids", torch.int64, BATCH, SEQ)
    for name, dtype in (("position_ids", torch.int64), ("attention_mask", torch.bool)):
        b.input(name, dtype, BATCH, SEQ)

    def param(name: str, tensor: Tensor) -> Any:
        made = Param(name, tuple(tensor.shape), tensor.dtype, (f"layer.{name}",))
        return b.program.add_param(made, tensor, before=b.end)

    row = b.call("aten.embedding.default", param("table", x), ids)
    value = b.call("aten.mul.Tensor", row, param("gain", torch.ones(x.shape[1])))
    y = b.call("aten.linear.default", value, param("weight", w.half()))
    # Something behind it, so that the layer is no output head; nothing can be moved through it.
    z = b.call(END, y, act="gelu")
    program = b.finish(b.call("aten.linear.default", z, param("head", torch.ones(2, len(w)))))
    order = list(program.graph.nodes)
    starts = {"prologue": order[0], "block0": order[order.index(row) + 1], "epilogue": z}
    cuts = [(name, order.index(node)) for name, node in starts.items()]
    program.segments = make_segments(program.graph, cuts)
    return program


def tokens_of(x: Tensor) -> Tensor:
    """Every row of X once: int64 [samples, LENGTH]."""
    return torch.arange(len(x)).view(-1, min(LENGTH, len(x)))


def outputs(program: Program, tokens: Tensor) -> Tensor:
    """What the layer gives, [tokens, m]: the value that goes into the activation behind it."""
    end = next(program.calls(END)).args[0]
    found: list[Tensor] = []
    for ids in tokens.split(8):
        run(
            program, model_inputs(ids),
            observe=lambda node, value: found.append(value) if node is end else None,
        )  # fmt: skip
    return torch.cat([f.flatten(0, -2) for f in found])


def compiled(program: Program, passes: str, tokens: Tensor) -> tuple[Compiled, float]:
    """The layer by a recipe, and the processor seconds that solving took, statistics included."""
    plan = make_plan(program, from_strings([passes]))
    began = time.process_time()
    done = compile_plan(plan, tokens)
    return done, time.process_time() - began


def measure(row: Row, program: Program, tokens: Tensor, exact: Tensor) -> dict[str, Any]:
    """One line: relative output error, bits per weight and seconds, or why there is none."""
    try:
        done, seconds = compiled(program, row.passes, tokens)
    except LlmcError as e:
        return {"kind": row.kind, "passes": row.passes, "refused": str(e)}
    error = (outputs(done.program, tokens) - exact).double().square().sum()
    told = report(done)
    return {
        "kind": row.kind, "passes": row.passes,
        "loss": float(error / exact.double().square().sum()),
        "bits_per_weight": told["totals"]["bits_per_weight"],
        "seconds": round(seconds, 2),
        "fallbacks": [reason for f in done.fallbacks for reason in f["reasons"]],
        "refusals": sorted({r["reason"] for r in told["refusals"]}),
    }  # fmt: skip


def problem(module: ModuleType, n: int) -> tuple[Program, Tensor, Tensor]:
    """(program, tokens, exact outputs) of a module with ``make(n)``."""
    w, x = module.make(n)
    program, tokens = layer_program(w, x), tokens_of(x)
    return program, tokens, outputs(program, tokens)
