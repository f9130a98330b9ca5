"""Calls of kernels under the Triton interpreter: what is refused, no tokens, lowered programs.

Triton reads TRITON_INTERPRET at import, so one child process runs all calls (this file as a script)
and the tests judge its answers. Each row's numbers: `test_kernel_numerics`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from interpreter import interpreted
from numerics import Case, parts_of

WEIGHT = Case("w4a16", {"N": 70, "K": 256}, 3)


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the child process found."""
    found: dict[str, dict[str, Any]] = interpreted(
        __file__, tmp_path_factory.mktemp("kernel_cache")
    )
    return found


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("wrong_columns", "expected x [3, 256], found [3, 255]"),
        ("strided_columns", "expected x with contiguous columns"),
        ("wrong_bias", "expected bias [70], found [71]"),
        ("wrong_dtype", "expected x in a float dtype, found torch.int32"),
        ("double", "expected x in a float dtype, found torch.float64"),
        ("wrong_tile", "found (128, 128)"),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    call: str, words: str, answers: dict[str, dict[str, Any]]
) -> None:
    """A misfit is a one-line usage error, not a wrong result."""
    assert words in answers["refusals"][call]


def test_no_tokens(answers: dict[str, dict[str, Any]]) -> None:
    """A call with M = 0 returns an empty result of the right shape."""
    assert answers["empty"]["shape"] == [0, 70]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scheme", ["dense", "asym", "sparse"])
def test_a_lowered_program_computes_the_same(
    scheme: str, dtype: str, answers: dict[str, dict[str, Any]]
) -> None:
    """Norm, gate and up with their product, then down and the sum, through the triton target."""
    answer = answers["lowered"][f"{scheme}-{dtype}"]
    fp32 = dtype == "float32"
    assert answer["kernels"] == ["w4a16_24" if scheme == "sparse" else "w4a16"] * 2
    assert answer["joined"] == [True, False], "the norm"
    # Relative to the reference program in the same dtype, over three linears deep in fp32 sums.
    assert answer["error"] < (1e-6 if fp32 else 2e-3)
    assert answer["resident"] == answer["held"], "something beside the packed weights is resident"


# ** the child process **


def _packed() -> Any:
    """A prepacked weight."""
    from llmc.codegen.kernels import row
    from llmc.codegen.prepack import prepack

    return prepack(row(WEIGHT.row), WEIGHT.problem, **parts_of(WEIGHT))


def _refusals() -> dict[str, str]:
    """The error texts of calls that do not fit."""
    import torch

    from llmc.codegen.launch import fused_linear
    from llmc.codegen.row import TileConfig
    from llmc.compiler.ir.errors import UsageError

    packed = _packed()
    x = torch.zeros(3, 256, dtype=torch.float16)
    calls: dict[str, dict[str, Any]] = {
        "wrong_columns": {"x": x[:, :255]},
        "strided_columns": {"x": torch.zeros(256, 3, dtype=torch.float16).T},
        "wrong_bias": {"x": x, "bias": x.new_zeros(71)},
        "wrong_dtype": {"x": x.to(torch.int32)},
        "double": {"x": x.double()},
        "wrong_tile": {"x": x, "config": TileConfig(128, 128)},
    }
    texts = {}
    for name, call in calls.items():
        try:
            fused_linear(packed, **call)
        except UsageError as error:
            texts[name] = str(error)
    return texts


def _lowered() -> dict[str, Any]:
    """A small program through the triton target, against its references."""
    import torch
    from lowering_programs import hidden, mlp

    from llmc.codegen.targets import lower
    from llmc.compiler.ir.interpret import run

    found: dict[str, Any] = {}
    schemes: dict[str, dict[str, Any]] = {
        "dense": {}, "asym": {"asym": True}, "sparse": {"sparse": True, "group": 64}
    }  # fmt: skip
    for dtype in (torch.float32, torch.float16):
        for name, scheme in schemes.items():
            program, x = mlp(dtype, **scheme), hidden(dtype)
            lowered = lower(program, "triton")
            y = run(lowered.program, {"h": x}, implementations=lowered.implementations)
            exact = run(program, {"h": x})
            params = lowered.program.params.values()
            dense = sum(p.bytes for p in params if p.name in ("gain", "up.bias"))
            found[f"{name}-{str(dtype).removeprefix('torch.')}"] = {
                "kernels": [p.kernel for p in lowered.placed],
                "joined": [p.fused.problem.norm for p in lowered.placed],
                "error": float((y - exact).float().norm() / exact.float().norm()),
                "resident": sum(lowered.resident_bytes.values()),
                "held": lowered.program.weight_bytes() - dense,
            }
    return found


def main() -> None:
    """Answer all calls as JSON on stdout."""
    import torch

    from llmc.codegen.launch import fused_linear

    torch.set_num_threads(1)
    empty = fused_linear(_packed(), torch.zeros(0, 256).half())
    answers: dict[str, Any] = {"refusals": _refusals(), "lowered": _lowered()}
    answers["empty"] = {"shape": list(empty.shape)}
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
