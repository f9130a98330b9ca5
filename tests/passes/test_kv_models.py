"""Caches of codes on captured models: rotations, windows, shared and single key heads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmc.compiler.analysis.rotation import Rotation, cache_sites
from llmc.compiler.ir.errors import GateError
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.compile import compile_plan
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.pipeline.recipe import from_strings
from llmc.compiler.pipeline.zoo import decoder
from llmc.compiler.runtime.lowering import runner_for

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import capture_tiny

LENGTH = 28


def ids(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 20, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def kept(program: Program, passes: str) -> Any:
    return compile_plan(make_plan(program, from_strings([passes])), ids(6, 1)).program


def decoded(program: Program, target: str) -> torch.Tensor:
    runner = runner_for(program, target, cached=True)
    cache, x = runner.start(2, 4), ids()
    pieces = [runner.forward(x[:, :9], cache=cache)]
    pieces += [runner.forward(x[:, t : t + 1], cache=cache) for t in range(9, LENGTH)]
    return torch.cat(pieces, 1)


@pytest.fixture(scope="module", params=["gemma3_text", "mistral", "one_key_head"])
def program(request: pytest.FixtureRequest) -> Program:
    transformers.logging.set_verbosity_error()
    if request.param == "one_key_head":
        return decoder(rope=1.0, kv=1)
    captured: Program = capture_tiny(request.param)
    return captured


def rotated(program: Program) -> list[bool]:
    return [isinstance(s.turn, Rotation) for s in cache_sites(kept(program, "kv8"))]


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_exact_where_nothing_is_coded(program: Program, target: str) -> None:
    """All tokens among the first, or in the window: the plain cache, rotated when read or not."""
    assert all(rotated(program))
    whole = runner_for(program).forward(ids())
    for passes in (f"kvquant:first={LENGTH},weigh=plain", "kivi:group=4,residual=32"):
        made = decoded(kept(program, passes), target)
        torch.testing.assert_close(made, whole, rtol=0, atol=2e-4 * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("passes", "most"),
    [("kv8", 0.02), ("kvfp8", 0.15), ("kivi:bits=8,group=4,residual=4", 0.02),
     ("kvquant:bits=4", 0.5)],
)  # fmt: skip
def test_codes_stay_near(program: Program, passes: str, most: float) -> None:
    whole = runner_for(program).forward(ids())
    off = (decoded(kept(program, passes), "cpu") - whole).abs().max() / whole.abs().max()
    assert 1e-5 < float(off) < most


def test_half_rotated_keys_are_refused_before_their_rotation_alone() -> None:
    made = capture_tiny("gpt_neox")
    with pytest.raises(GateError, match=r"brings positions into the keys.*at node attention"):
        make_plan(made, from_strings(["kvquant"]))
    assert len(kept(made, "kivi:group=4,residual=8").caches) == 2


def test_keys_without_a_rotation_are_kept_as_they_are() -> None:
    made = kept(decoder(), "kvquant:first=64")
    assert [c.turned for c in made.caches.values()] == [False, False]
    torch.testing.assert_close(decoded(made, "reference"), runner_for(made).forward(ids()),
                               rtol=0, atol=1e-5)  # fmt: skip
