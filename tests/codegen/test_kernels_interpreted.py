"""Every kernel row against its op row's reference in fp64, under the Triton interpreter.

Triton reads TRITON_INTERPRET at import, so one child process runs all cases (this file as a script)
and the tests judge its answers. The error bound is K·u·Σ|x||w|, scaled per output, never flat.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Case:
    """One call: shape, scheme, side inputs, tile; group 0 is one scale per row."""

    row: str
    M: int
    N: int
    K: int
    group: int
    dtype: str = "fp16"
    scale: str = "fp16"
    asym: bool = False
    bias: bool = False
    residual: bool = False
    norm: bool = False
    strided: bool = False
    tile: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        flags = [
            f for f in ("asym", "bias", "residual", "norm", "strided") if getattr(self, f) is True
        ]
        tile = [f"{self.tile[0]}x{self.tile[1]}"] if self.tile else []
        shape = f"{self.M}x{self.N}x{self.K}-g{self.group}-{self.dtype}-s{self.scale}"
        return "-".join([self.row, shape, *flags, *tile])


ALL = {"asym": True, "bias": True, "residual": True, "norm": True}
CASES = [
    # groups, tails of K and odd N
    Case("w4a16", 1, 33, 96, 32),
    Case("w4a16", 3, 70, 200, 64),
    Case("w4a16", 17, 65, 200, 128),
    Case("w4a16", 3, 64, 600, 256),
    Case("w4a16", 3, 1, 130, 0),
    Case("w4a16", 1, 33, 96, 32, asym=True),
    Case("w4a16", 3, 70, 200, 64, asym=True),
    Case("w4a16", 17, 65, 200, 128, asym=True),
    Case("w4a16", 2, 64, 600, 256, asym=True, scale="bf16"),
    Case("w4a16", 17, 66, 150, 0, asym=True),
    # side inputs, one by one and together
    Case("w4a16", 3, 70, 256, 128, bias=True),
    Case("w4a16", 3, 70, 256, 128, residual=True),
    Case("w4a16", 3, 70, 256, 128, norm=True),
    Case("w4a16", 3, 70, 200, 64, **ALL),
    Case("w4a16", 17, 33, 328, 0, **ALL),
    # dtypes and layouts
    Case("w4a16", 1, 70, 200, 32, dtype="fp32", **ALL),
    Case("w4a16", 17, 66, 300, 128, dtype="fp32"),
    Case("w4a16", 3, 70, 200, 64, dtype="bf16", scale="bf16", asym=True),
    Case("w4a16", 3, 70, 200, 128, dtype="bf16", norm=True, residual=True),
    Case("w4a16", 5, 40, 160, 32, strided=True, residual=True),
    # every tile
    *[
        Case("w4a16", 19, 128, 160, 128, asym=True, norm=True, tile=tile)
        for tile in [
            (8, 32), (8, 64), (8, 128), (16, 32), (16, 64), (16, 128), (32, 64), (32, 128), (64, 64)
        ]
    ],
    # 2:4
    Case("w4a16_24", 1, 33, 96, 32),
    Case("w4a16_24", 3, 70, 300, 64),
    Case("w4a16_24", 17, 65, 300, 128),
    Case("w4a16_24", 3, 64, 600, 256),
    Case("w4a16_24", 3, 1, 132, 0),
    Case("w4a16_24", 1, 33, 96, 32, asym=True),
    Case("w4a16_24", 3, 70, 520, 128, asym=True, scale="bf16"),
    Case("w4a16_24", 17, 66, 260, 0, asym=True),
    Case("w4a16_24", 3, 70, 256, 128, bias=True),
    Case("w4a16_24", 3, 70, 300, 64, **ALL),
    Case("w4a16_24", 2, 70, 300, 32, dtype="fp32", **ALL),
    Case("w4a16_24", 3, 70, 200, 64, dtype="bf16", scale="bf16", asym=True),
    Case("w4a16_24", 5, 40, 260, 64, strided=True, residual=True),
    *[
        Case("w4a16_24", 19, 128, 260, 128, asym=True, tile=tile)
        for tile in [(8, 32), (16, 32), (16, 64), (16, 128), (32, 64)]
    ],
]  # fmt: skip


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the child process found for each case, by label."""
    cache = str(tmp_path_factory.mktemp("kernel_cache"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": cache}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_kernel_computes_its_op(case: Case, answers: dict[str, dict[str, Any]]) -> None:
    """Within the bound, the same twice, and wrong beyond the bound when one code is changed."""
    answer = answers[case.label]
    assert answer["finite"]
    assert answer["ratio"] <= 1.0, f"error is {answer['ratio']:.2f} of its bound"
    if not case.tile:
        assert answer["same_twice"], "two launches gave different bits"
        assert answer["spoiled_ratio"] > 1.0, "the bound does not see a code that is off by eight"


def test_every_tile_of_every_row_is_covered() -> None:
    """The grid of both 4-bit rows is what the cases above run."""
    from llmc.codegen.rows.int4 import W4A16, W4A16_24

    for row in (W4A16, W4A16_24):
        tiles = {c.tile for c in CASES if c.row == row.name and c.tile}
        assert tiles == set(row.tiles)


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
    """Norm, two linears, gate, linear and residual through the triton target."""
    answer = answers["lowered"][f"{scheme}-{dtype}"]
    fp32 = dtype == "float32"
    assert answer["kernels"] == ["w4a16_24" if scheme == "sparse" else "w4a16"] * 3
    assert answer["joined"] == [fp32, fp32, False], "fp16 norms stay out, for range"
    # Relative to the reference program in the same dtype, over three linears deep in fp32 sums.
    assert answer["error"] < (1e-6 if fp32 else 2e-3)
    assert answer["resident"] == answer["held"], "something beside the packed weights is resident"


# ** the child process **


def _weights(case: Case) -> tuple[Any, dict[str, Any]]:
    """The prepacked weight of a case, and the canonical tensors for the reference."""
    import torch

    from llmc.codegen.kernels import row
    from llmc.codegen.problem import DTYPES, Problem
    from llmc.compiler.ir import packing

    g = torch.Generator().manual_seed(len(case.label) + case.N)
    sparse = case.row == "w4a16_24"
    columns = case.K // 2 if sparse else case.K
    group = (case.group // 2 if sparse else case.group) or columns
    problem = Problem(
        case.N, case.K, group=group, n=2 if sparse else 0, m=4 if sparse else 0,
        x_dtype=case.dtype, scale_dtype=case.scale, asym=case.asym, eps=1e-5 if case.norm else 0.0,
    )  # fmt: skip
    q = torch.randint(0, 16, (case.N, case.K), generator=g)
    meta = None
    if sparse:
        order = torch.rand(case.N, case.K // 4, 4, generator=g).argsort(dim=-1)
        q, meta = packing.compress_nm(q, (order < 2).flatten(-2), 2, 4)
    scale = (torch.rand(case.N, problem.groups, generator=g) * 0.05 + 0.01).to(DTYPES[case.scale])
    zero = None
    if case.asym:
        zero = torch.randint(0, 16, scale.shape, generator=g).to(torch.uint8)
    tensors = {"codes": packing.pack(q, 4), "scale": scale, "zero": zero, "meta": meta}
    attrs = {"bits": 4, "group": group, "columns": case.K, "n": problem.n, "m": problem.m}
    return (row(case.row), problem, q), {**tensors, "attrs": attrs}


def _inputs(case: Case) -> tuple[Any, dict[str, Any]]:
    import torch

    from llmc.codegen.problem import DTYPES

    g = torch.Generator().manual_seed(case.M)
    dtype = DTYPES[case.dtype]
    stretch = 2 if case.strided else 1
    x = torch.randn(case.M, case.K * stretch, generator=g).to(dtype)[:, : case.K]
    sides: dict[str, Any] = {}
    if case.bias:
        sides["bias"] = torch.randn(case.N, generator=g).to(dtype)
    if case.residual:
        sides["residual"] = torch.randn(case.M, case.N * stretch, generator=g).to(dtype)
        sides["residual"] = sides["residual"][:, : case.N]
    if case.norm:
        sides["gain"] = torch.rand(case.K, generator=g) + 0.5
    return x, sides


def _answer(case: Case) -> dict[str, Any]:
    """Errors of one case as shares of their bound."""
    import torch

    from llmc.codegen.launch import fused_linear
    from llmc.codegen.prepack import prepack
    from llmc.codegen.row import TileConfig
    from llmc.compiler.ir import packing
    from llmc.compiler.ir.ops.compressed import fused_linear as reference

    (row, problem, q), canonical = _weights(case)
    attrs = canonical.pop("attrs")
    x, sides = _inputs(case)
    eps = 1e-5 if case.norm else 0.0
    config = TileConfig(*case.tile) if case.tile else None

    def launch(codes: Any) -> Any:
        packed = prepack(row, problem, **{**canonical, "codes": codes})
        return fused_linear(packed, x, **sides, config=config)

    wide = {k: v.double() for k, v in sides.items()}
    exact = reference(x.double(), *canonical.values(), **wide, **attrs, eps=eps)
    eye = torch.eye(case.K, dtype=torch.float64)
    w = reference(eye, *canonical.values(), **attrs).T
    xn = x.double()
    if case.norm:
        xn = xn * torch.rsqrt(xn.pow(2).mean(-1, keepdim=True) + eps) * wide["gain"]
    products = xn.abs() @ w.abs().T
    u_out = torch.finfo(x.dtype).eps / 2
    # fp32 sums of K products; one rounding of x * gain when the norm is fused; the output rounding.
    bound = (case.K + 8) * 2.0**-24 * (products + sum(v.abs().max() for v in wide.values()))
    bound = bound + (2 * u_out * products if case.norm else 0) + 2 * u_out * exact.abs() + 1e-12

    y = launch(canonical["codes"])
    answer = {
        "finite": bool(y.isfinite().all()),
        "ratio": float(((y.double() - exact).abs() / bound).max()),
    }
    if case.tile:
        return answer
    spoiled = q.clone().to(torch.int64)
    spoiled[0, 0] ^= 8
    off = launch(packing.pack(spoiled, 4))
    return {
        **answer,
        "same_twice": bool(torch.equal(y, launch(canonical["codes"]))),
        "spoiled_ratio": float(((off.double() - exact).abs() / bound)[:, 0].max()),
    }


def _refusals() -> dict[str, str]:
    """The error texts of calls that do not fit."""
    import torch

    from llmc.codegen.launch import fused_linear
    from llmc.codegen.prepack import prepack
    from llmc.codegen.row import TileConfig
    from llmc.compiler.ir.errors import UsageError

    (row, problem, _), canonical = _weights(Case("w4a16", 3, 70, 256, 128))
    canonical.pop("attrs")
    packed = prepack(row, problem, **canonical)
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
    """Answer all cases as JSON on stdout."""
    import torch

    from llmc.codegen.launch import fused_linear
    from llmc.codegen.prepack import prepack

    torch.set_num_threads(1)
    answers: dict[str, Any] = {case.label: _answer(case) for case in CASES}
    answers["refusals"] = _refusals()
    answers["lowered"] = _lowered()
    (row, problem, _), canonical = _weights(Case("w4a16", 1, 70, 256, 128))
    canonical.pop("attrs")
    empty = fused_linear(prepack(row, problem, **canonical), torch.zeros(0, 256).half())
    answers["empty"] = {"shape": list(empty.shape)}
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
