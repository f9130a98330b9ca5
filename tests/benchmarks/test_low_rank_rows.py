"""The rows of the low-rank table: every recipe plans on a small program; the table tells bytes."""

import importlib
import sys

import pytest

from llmc.compiler.pipeline import zoo
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_strings


@pytest.fixture
def low_rank(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    yield importlib.import_module("low_rank")
    for name in ("low_rank", "width", "speed"):
        sys.modules.pop(name, None)


def test_every_row_is_a_recipe_that_saves_bytes(low_rank):
    program = zoo.decoder(hidden=64, inner=96, size=16, blocks=1)
    rows = dict(low_rank.recipes([0.1, 0.3]))
    assert len(rows) == 2 * len(low_rank.METHODS) + len(low_rank.COMBINED)
    before = low_rank.block_bytes(program)
    for passes in dict.fromkeys(rows.values()):
        plan = make_plan(program, from_strings([passes]))
        if "lorc" not in passes and "residual" not in passes:
            assert low_rank.block_bytes(plan.program) < before, passes


def test_the_table_tells_shares_of_the_dense_blocks(low_rank):
    row = {"name": "dense", "passes": "", "perplexity": 9.0, "block_bytes": 200}
    less = {"name": "svd, 20%", "passes": "svd", "perplexity": 10.5, "block_bytes": 160}
    lines = low_rank.table({"rows": [row, less]}).splitlines()
    assert lines[-1] == "| svd, 20% | `svd` | 10.500 | 80.0% |"
