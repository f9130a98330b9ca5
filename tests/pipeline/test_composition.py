"""Every grid and input grid beside everything else of one string: it composes, or says why not.

Variants come from the registry: a new pass is tried without a word here, and a refusal that the
table does not name fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.capture import capture
from llmc.compiler.ir.errors import UsageError
from llmc.compiler.ir.interpret import run
from llmc.compiler.ir.verifier import verify, verify_tensors
from llmc.compiler.pipeline import recipe
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.measure import model_inputs
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.registry import all_passes
from llmc.compiler.runtime.artefact import Contents, load, save

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make

BESIDE = {
    "alone": "{}",
    "smooth": "smooth,{}",
    "two of four": "prune24,{}",
    "half": "prune:sparsity=0.5,{}",
    "low rank": "{},lorc:rank=2",
    "all": "smooth,prune24,{},lorc:rank=2",
    "cache": "{},kv8",
}
GRIDS = {name: made for name, made in all_passes().items() if made.stage in ("grid", "inputs")}
SHORT = {"squeezellm": ":samples=2"}
"""Knobs that save time and change no kind of part."""

NO_ZERO, PARTED = "expected a grid that holds 0", "expected pairs of neighbours"
UNLOST, ROTATED = "expected a grid or a mask beside 'lorc'", "beside an online rotation, found "
REFUSED = {
    ("bcq", "half"): NO_ZERO,
    ("binary", "half"): NO_ZERO,
    ("olive", "two of four"): PARTED,
    ("olive", "all"): PARTED,
    ("a8", "low rank"): UNLOST,
    ("a4", "low rank"): UNLOST,
    ("quip", "half"): NO_ZERO,
    ("quip", "smooth"): "expected channel scales or a rotation",
    ("quip", "all"): "expected channel scales or a rotation",
    ("quip", "two of four"): f"{ROTATED}mask",
    ("quip", "low rank"): f"{ROTATED}low_rank",
}
"""What has no meaning together, and how the refusal begins."""

MOVES = [n for n, made in all_passes().items() if made.stage in ("equivalence", "permute")]
BEHIND = ["w4:group=8", "prune24,spqr", "w8a8:act=static,act_clip=mse", "prune24,nf4,lorc:rank=2"]


@pytest.fixture(scope="module")
def llama():
    program = capture(make("llama", num_hidden_layers=1, num_attention_heads=2))
    apply_segments(program)
    return program


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def _no_wait_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


def test_the_table_of_refusals_speaks_of_what_is_there():
    assert {name for name, _ in REFUSED} <= {*GRIDS, *MOVES}
    assert {beside for _, beside in REFUSED} <= {*BESIDE, *BEHIND}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("name", GRIDS)
def test_it_composes_or_says_why_not(name, beside, llama, tokens, tmp_path):
    text = BESIDE[beside].format(name + SHORT.get(name, ""))
    _tried(text, REFUSED.get((name, beside)), llama, tokens, tmp_path)


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("name", MOVES)
def test_what_moves_scales_goes_before_grids_and_masks(name, behind, llama, tokens, tmp_path):
    text = f"{name}{SHORT.get(name, '')},{behind}"
    _tried(text, REFUSED.get((name, behind)), llama, tokens, tmp_path)


def _tried(text, why, llama, tokens, tmp_path):
    if why is not None:
        with pytest.raises(UsageError, match=why):
            make_plan(llama, recipe.from_strings([text]))
        return
    plan = make_plan(llama, recipe.from_strings([text]))
    done = compile_plan(plan, tokens)
    verify(done.program)
    verify_tensors(done.program)
    planned, found = plan.program.weight_bytes(), done.program.weight_bytes()
    assert planned == found if plan.exact else planned >= found
    assert len(done.records) == 7
    for record, d in zip(done.records, plan.stages[-1].decisions.values(), strict=True):
        _zeros(record, d)
    save(tmp_path / "out", Contents(done.program))
    again = load(tmp_path / "out", verify=True).program
    assert again.weight_bytes() == found
    logits = run(done.program, model_inputs(tokens))
    assert bool(torch.isfinite(logits).all())
    assert torch.equal(run(again, model_inputs(tokens)), logits)


def _zeros(record, d):
    """What the mask says is dropped is, to the weight."""
    mask, size = d.scheme.mask, d.site.in_features * d.site.out_features
    dropped, beside = (round(record.get(k, 0.0) * size) for k in ("zeros", "outliers"))
    if mask is None:
        assert dropped == 0
    elif mask.structured:
        assert size // 2 - beside <= dropped <= size // 2
    else:
        assert dropped == size // 2
