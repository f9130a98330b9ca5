"""One child process for the cases of all tests of sides: what they share is its start."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numerics import Case, run_cases


def case(M: int, N: int, K: int, name: str = "w4a16", **other: Any) -> Case:
    """A case of 4-bit weights; "stride", "tile" and "spoil" go beside the problem's fields."""
    own = {k: other.pop(k) for k in ("stride", "tile", "spoil") if k in other}
    sparse = {"n": 2, "m": 4, "group": 32} if name == "w4a16_24" else {"group": 64}
    return Case(name, {"N": N, "K": K, "eps": 1e-5, **sparse, **other}, M, **own)


@functools.cache
def _all() -> dict[str, dict[str, Any]]:
    import test_sides_beside
    import test_sides_centred
    import test_sides_coded
    import test_sides_factors
    import test_sides_inputs
    import test_sides_spans

    modules = (
        test_sides_inputs, test_sides_beside, test_sides_centred, test_sides_factors,
        test_sides_spans, test_sides_coded,
    )  # fmt: skip
    cases = [c for module in modules for c in module.CASES]
    with tempfile.TemporaryDirectory() as folder:
        found = run_cases(cases, Path(folder))
    return {c.label: answer for c, answer in zip(cases, found, strict=True)}


def answers(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What the child process found, case by case."""
    return [_all()[c.label] for c in cases]
