"""Lowered programs as modules: torch exports, compiles and packs them with our ops inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_programs import hidden, mlp

from llmc.codegen.modules import as_module
from llmc.codegen.placed import Implementation, read_problem, resolve, write_problem
from llmc.codegen.problem import Problem
from llmc.codegen.targets import Lowered, lower
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.pipeline import zoo
from llmc.compiler.runtime.cache import add_cache

TARGETS = ("reference", "cpu")


def lowered(target: str) -> Lowered:
    return lower(mlp(torch.bfloat16, asym=True), target)


def value(made: Lowered, x: torch.Tensor) -> torch.Tensor:
    return run(made.program, {"h": x}, implementations=made.implementations)


def exported(made: Lowered) -> torch.export.ExportedProgram:
    dims = {0: torch.export.Dim("B", min=2, max=8), 1: torch.export.Dim("S", min=2, max=64)}
    x = hidden(torch.bfloat16)
    return torch.export.export(as_module(made), (x,), dynamic_shapes={"h": dims})


@pytest.mark.parametrize("target", TARGETS)
def test_modules_export_with_dynamic_shapes(target: str) -> None:
    """Kernels stay single ops; another batch and length give what the runner gives."""
    made = lowered(target)
    program = exported(made)
    ops = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert ops.count(torch.ops.llmc.placed.default) == len(made.placed) == 2 * (target == "cpu")
    x = torch.randn(3, 7, 64).to(torch.bfloat16)
    assert torch.equal(program.module()(x), value(made, x))


def test_inductor_compiles_around_our_ops() -> None:
    """One graph, no break."""
    made, x = lowered("cpu"), hidden(torch.bfloat16)
    compiled = torch.compile(as_module(made), fullgraph=True)
    torch.testing.assert_close(compiled(x), value(made, x), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_aot_inductor_packs_kernels(tmp_path: Path) -> None:
    """A package that calls our ops through the dispatcher, loaded again."""
    made, x = lowered("cpu"), hidden(torch.bfloat16)
    package = torch._inductor.aoti_compile_and_package(
        exported(made), package_path=str(tmp_path / "model.pt2")
    )
    loaded: Any = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(x), value(made, x), rtol=2e-2, atol=2e-2)


def test_the_op_keeps_torchs_rules() -> None:
    made = lowered("cpu")
    node = made.program.node(made.placed[0].fused.node)
    one = made.implementations[node.name]
    assert isinstance(one, Implementation)
    given = [
        hidden(torch.bfloat16) if p is None else made.program.fetch(p.name)
        for p in (made.program.param_of(a) for a in node.args[0])  # type: ignore[union-attr]
    ]
    args, kwargs = one.as_op(given)
    torch.library.opcheck(
        torch.ops.llmc.placed.default, args, kwargs, test_utils=("test_schema", "test_faketensor")
    )
    assert torch.equal(torch.ops.llmc.placed(*args, **kwargs), one(given))


def test_problems_are_written_and_read() -> None:
    problem = Problem(96, 64, group=32, x_dtype="bf16", rounds="int8 token limit=2.5", eps=1e-6)
    assert read_problem(write_problem(problem)) == problem
    with pytest.raises(UsageError, match="expected a problem"):
        read_problem('{"N": 3, "rows": 4}')


def test_unknown_kernels_and_states_are_refused() -> None:
    problem = write_problem(Problem(64, 64))
    with pytest.raises(UsageError, match="did you mean 'aten::_int_mm'"):
        resolve("cpu", "aten::_int_m", problem)
    with pytest.raises(UsageError, match="no kernel row 'w4a1'"):
        resolve("triton", "w4a1", problem)
    with pytest.raises(UsageError, match="expected target cpu or triton"):
        resolve("tpu", "w4a16", problem)
    with pytest.raises(UsageError, match="a program without state, found 2 caches"):
        as_module(lower(add_cache(zoo.decoder()), "reference"))
