"""What solving one layer costs, from a ready Hessian: grids by their solvers, and AWQ's search.

The Hessian has a decaying spectrum and one loud channel; only the time matters here. Grids are
those that the passes ask for.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from method_layer import layer_program

from llmc.compiler.pipeline.griding import grid_of, outliers
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.solvers import prepare, solve
from llmc.compiler.solvers.equivalent import Reader, powers, search

SEARCH = "search of awq for "
UNIT = "one product and one Cholesky factor"
ALPHAS = tuple(i / 20 for i in range(20))
CASES = (
    UNIT, "w4", f"{SEARCH}w4", "w4:clip=absmax", f"{SEARCH}w4:clip=absmax", "w4:solver=rtn",
    "w4:clip=output", "w4:group=32", "w4:symmetric=false", "w4:act_order=true", "w4:sweeps=1",
    "w2", "nf4", "nf4:double=true", "fp4", "quantile", "ternary", "olive",
    "spqr", "squeezellm:weigh=gram", "squeezellm:weigh=gram,solver=gptq", "gobo",
    "gobo:solver=gptq", "bcq", "bcq:solver=rtn",
)  # fmt: skip


class Layer:
    """W [n, n], X^T X [n, n] and the mean magnitude of each input [n]."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.w = torch.randn(n, n, generator=g) / n**0.5
        x = torch.randn(2 * n, n, generator=g) * torch.arange(1, n + 1).float().pow(-0.35)
        x[:, 3] *= 20
        self.h, self.size = x.T @ x, x.abs().mean(0)
        self.program = layer_program(self.w, x[:1])

    def decided(self, passes: str) -> Any:
        """What a recipe decides about W."""
        plan = make_plan(self.program, from_strings([passes]))
        return next(iter(plan.stages[0].decisions.values()))


def _action(layer: Layer, case: str) -> Callable[[], Any]:
    if case == UNIT:
        ridged = layer.h + torch.eye(len(layer.h)) * layer.h.diagonal().mean()
        return lambda: (layer.w @ layer.w, torch.linalg.cholesky(ridged))
    d = layer.decided(case.removeprefix(SEARCH))
    grid, o = grid_of(d.scheme.codes, d.options), d.options
    assert grid is not None
    if case.startswith(SEARCH):
        return lambda: search([Reader(layer.w, grid)], layer.h, powers(layer.size, ALPHAS))

    def run() -> Any:
        factor = prepare(layer.h, o.get("damp", 0.01))
        return solve(
            layer.w, grid=grid, factor=factor, grid_solver=o["grid_solver"],
            act_order=o.get("act_order", False), sweeps=o.get("sweeps", 0),
            extra=outliers(layer.w, d.scheme.sparse, o, factor, None),
            threshold=o.get("threshold"),
            most=1.0 if d.scheme.sparse is None else d.scheme.sparse.share,
        )  # fmt: skip

    return run


def measure(layer: Layer, case: str, repeats: int) -> dict[str, Any]:
    """The least seconds of the repeats, on the wall and of the processor."""
    action = _action(layer, case)
    found = []
    for _ in range(repeats):
        gc.collect()
        began = time.perf_counter(), time.process_time()
        action()
        found.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, processor = (min(f[i] for f in found) for i in (0, 1))
    return {"seconds": round(wall, 3), "processor_seconds": round(processor, 3)}
