"""Segment boundaries: no scale crosses one, and types follow new tensors through whole chains."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.migrate import MigrationSite, migration_sites
from llmc.compiler.ir.dims import BATCH, SEQ
from llmc.compiler.ir.graph import Program, tensor_type
from llmc.compiler.ir.refusal import Refusal
from llmc.compiler.ir.verifier import verify
from llmc.compiler.pipeline.encode import refresh_types
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.solving import Work, fold
from llmc.compiler.pipeline.statistics import Collection
from llmc.compiler.pipeline.zoo import ZOO, Builder, build


def chain(blocks: int) -> Program:
    """Without a residual stream, blocks end behind a norm: its readers lie in the next one."""
    b = Builder()
    ids = b.input("input_ids", torch.int64, BATCH, SEQ)
    x = b.linear(b.call("aten.embedding.default", b.param(20, 16), ids), 16, 16)
    for _ in range(blocks):
        x = b.linear(b.call("llmc.rms_norm", x, b.param(16, near=1.0), eps=1e-5), 16, 16)
    return b.finish(b.linear(b.call("llmc.activation", x, act="gelu"), 20, 16))


def test_a_scale_never_crosses_a_boundary() -> None:
    program = chain(3)
    apply_segments(program)
    assert len(program.segments) > 3
    refused = [r for r in migration_sites(program) if isinstance(r, Refusal)]
    assert [r.predicate for r in refused].count("within_segment") == 3


@pytest.mark.parametrize("name", sorted(ZOO))
def test_absorbers_lie_where_their_readers_do(name: str) -> None:
    program = build(name)
    apply_segments(program)
    home = {n: s.name for s in program.segments for n in s.nodes}
    sites = [s for s in migration_sites(program) if isinstance(s, MigrationSite)]
    assert sites
    for s in sites:
        assert {home[program.param_node(a.param).name] for a in s.absorbers} == {s.segment}


def test_statistics_follow_a_fold_through_moves() -> None:
    b = Builder()
    ids = b.input("input_ids", torch.int64, BATCH, SEQ)
    x = b.call("aten.embedding.default", b.param(20, 16), ids)
    plain = b.call("llmc.rms_norm", x, b.param(16, near=1.0), eps=1e-5)
    moved = b.call("aten.clone.default", plain)
    both = [b.linear(value, 16, 16) for value in (plain, moved)]
    program = b.finish(b.linear(b.call("llmc.gated", *both, act="silu"), 20, 16))
    plan = make_plan(program, from_strings(["smooth"]))
    site = next(m for m in plan.stages[0].migrations if len(m.site.consumers) == 2)
    stats = Collection()
    rows = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for value in (plain.name, moved.name):
        stats.want(value, "gram")
        stats.want(value, "absmax")
        stats.update(value, rows)
    fold(Work(plan, torch.device("cpu")), site, stats)
    first, second = (stats.get(v.name, "gram").value for v in (plain, moved))
    assert torch.equal(first, second)
    assert not torch.equal(first, rows.T @ rows)


def test_types_follow_a_new_shape_through_a_chain() -> None:
    b = Builder()
    x = b.input("x", torch.float32, BATCH, 1)
    table = b.param(4)
    chained = b.call("aten.neg.default", b.call("aten.relu.default", table))
    program = b.finish(b.call("aten.mul.Tensor", x, chained))
    program.set_tensor("p0", torch.ones(6))
    refresh_types(program)
    assert tensor_type(chained).shape == (6,)
    assert tensor_type(program.output.all_input_nodes[0]).shape == (BATCH, 6)
    assert str(program.output.meta["llmc"].type) == str(tensor_type(program.output.args[0]))
    verify(program)
