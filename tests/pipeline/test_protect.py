"""protect_first and protect_last: blocks that weight passes leave as they are, and say so."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.ir.errors import GateError, UsageError
from llmc.compiler.pipeline import recipe, zoo
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan


def planned(text):
    return make_plan(zoo.decoder(hidden=16, inner=32, blocks=3), recipe.from_strings([text]))


def blocks(plan, name):
    """Blocks whose weights that pass speaks about."""
    of = [d for s in plan.stages for d in s.decisions.values() if name in d.passes]
    return {d.site.segment for d in of}


@pytest.mark.parametrize(
    ("knobs", "kept"),
    [
        ("", {"block0", "block1", "block2"}),
        ("protect_first=1", {"block1", "block2"}),
        ("protect_last=2", {"block0"}),
        ("protect_first=1,protect_last=1", {"block1"}),
    ],
)
@pytest.mark.parametrize("name", ["prune24", "w4"])
def test_protected_blocks_are_refusals_that_say_why(name, knobs, kept):
    plan = planned(f"{name}:{knobs}" if knobs else name)
    assert blocks(plan, name) == kept
    refused = [r for r in plan.refusals if r.predicate == "protected"]
    assert len(refused) == 7 * (3 - len(kept))
    assert {r.by for r in refused} <= {name}
    assert all("of 3 is protected" in r.reason for r in refused)


def test_passes_of_one_string_protect_blocks_of_their_own():
    plan = planned("prune24:protect_first=1,w4:group=8,protect_last=1")
    assert blocks(plan, "prune24") == {"block1", "block2"}
    assert blocks(plan, "w4") == {"block0", "block1"}
    done = compile_plan(plan, torch.arange(32).view(2, 16) % 20)
    shown = {s["site"].split("/")[0]: s["scheme"] for s in plan.rows()}
    assert shown == {"block0": "w4 g8", "block1": "2:4 w4 g8", "block2": "2:4"}
    assert len(done.records) == 21


def test_protecting_every_block_leaves_no_place():
    with pytest.raises(GateError, match="is protected"):
        planned("prune24:protect_first=2,protect_last=2")
    with pytest.raises(UsageError, match=r"protect_first: expected 0\.\."):
        recipe.from_strings(["w4:protect_first=-1"])
