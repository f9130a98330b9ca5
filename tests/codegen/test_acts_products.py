"""Rows whose inputs are rounded to eight bits, under the interpreter: codes and products.

Triton reads TRITON_INTERPRET at import, so one child process runs all cases (this file as a script)
and the tests judge its answers.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from acts_cases import Case, expected, inputs_of, parts_of, problem_of
from interpreter import interpreted

ALL = {"bias": True, "residual": True, "norm": True, "smooth": True}
CODES = [f"{kind} {per}" for kind in ("int8", "e4m3") for per in ("token", "token power", "static")]
WIDE = (32, 128)  # a tile whose x is rounded by a kernel of its own
CASES = [
    # one launch: every program rounds what it reads
    Case("w8a8", 1, 33, 96),
    Case("w8a8", 3, 70, 200, bias=True, residual=True),
    Case("w8a8", 5, 70, 300, smooth=True, strided=True, residual=True),
    Case("w8a8", 3, 65, 200, 32, **ALL),
    Case("w8a8", 3, 70, 256, 64, dtype="bf16"),
    Case("w8a8", 3, 70, 600, 256, norm=True, dtype="fp32"),
    Case("w8a8", 2, 1, 130, rounds="int8 static", dtype="fp32", bits=3),
    Case("w8a8", 3, 36, 200, act="silu", pairs="gate", dtype="fp32", bias=True),
    Case("w8a8", 3, 70, 200, rounds="int8 token limit=6.0", spike=True, dtype="fp32"),
    Case("w8a8", 3, 70, 256, 64, rounds="int8 static limit=6.0", spike=True),
    Case("int8_split", 3, 70, 200, outliers=5, rounds="int8 token limit=6.0", spike=True),
    Case("int8_split", 3, 70, 300, outliers=37, dtype="fp32", **ALL),
    Case("w8a8", 3, 70, 200, rounds="int8 token power", norm=True, dtype="fp32"),
    # two launches
    Case("w8a8", 33, 70, 300, 128, bias=True, residual=True, strided=True, tile=WIDE),
    Case("w8a8", 3, 70, 256, 32, norm=True, smooth=True, dtype="fp32", tile=WIDE),
    Case("w8a8", 3, 70, 200, rounds="int8 token power", norm=True, dtype="fp32", tile=WIDE),
    Case("w8a8", 3, 70, 256, 64, rounds="int8 token limit=6.0", spike=True, tile=WIDE),
    Case("int8_split", 3, 70, 200, outliers=5, rounds="int8 token limit=6.0", spike=True,
         norm=True, tile=WIDE),
    Case("int8_split", 3, 70, 300, 32, outliers=37, dtype="fp32", **ALL, tile=WIDE),
    # large tiles
    *[Case("w8a8", 19, 256, 160, tile=t) for t in ((8, 128), (64, 128), (128, 256))],
    # 4-bit weights
    Case("w4a8", 1, 33, 96, bits=4),
    Case("w4a8", 3, 70, 200, 32, bits=4, **ALL),
    Case("w4a8", 3, 70, 600, 256, bits=4, dtype="fp32", rounds="int8 token limit=6.0", spike=True),
    Case("w4a8", 3, 70, 300, 128, bits=4, dtype="fp32", tile=WIDE),
    Case("w4a8", 3, 72, 256, 32, bits=4, outliers=5, rounds="int8 token limit=6.0", spike=True,
         tile=WIDE),
    # e4m3
    Case("fp8", 1, 33, 96, rounds="e4m3 token"),
    Case("fp8", 3, 70, 200, 32, rounds="e4m3 token", **ALL),
    Case("fp8", 3, 70, 256, rounds="e4m3 static", dtype="fp32", smooth=True),
    Case("fp8", 3, 70, 300, 128, rounds="e4m3 token limit=6.0", spike=True, strided=True),
    Case("fp8", 3, 70, 200, rounds="e4m3 token", dtype="fp32", bias=True, norm=True, tile=WIDE),
    Case("fp8", 3, 70, 200, 64, rounds="e4m3 token power", tile=WIDE),
    Case("fp8", 33, 70, 160, rounds="e4m3 token limit=6.0", spike=True, smooth=True, tile=(32, 64)),
    Case("fp8", 3, 40, 160, rounds="e4m3 static", act="gelu_tanh", pairs="gate", tile=(16, 64)),
]  # fmt: skip


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process found, by label."""
    found: dict[str, Any] = interpreted(__file__, tmp_path_factory.mktemp("kernel_cache"))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_products_of_codes_are_exact(case: Case, answers: dict[str, Any]) -> None:
    """Within the few roundings behind exact sums, the same twice, and wrong by one code more."""
    answer = answers[case.label]
    assert answer["ratio"] <= 1.0, f"error is {answer['ratio']:.2f} of its bound"
    if case.M < 19:
        assert answer["same_twice"], "two launches gave different bits"
        assert answer["spoiled_ratio"] > 1.0, "the bound does not see a code that is off"


def test_one_launch_and_two_give_the_same_bits(answers: dict[str, Any]) -> None:
    """Which kernel rounds x is a question of speed alone."""
    assert answers["launches"]["kernels"] == [1, 2]
    assert answers["launches"]["same"]


@pytest.mark.parametrize("name", CODES)
def test_codes_are_those_of_the_reference(name: str, answers: dict[str, Any]) -> None:
    """Bit for bit, of fp32 and bf16 inputs, ties and empty tokens among them."""
    assert answers["codes"][name] == {"codes": True, "scale": True, "padding": True}


def test_what_is_no_number_spoils_its_token_alone(answers: dict[str, Any]) -> None:
    """NaN for a token that holds NaN or infinity (a stored scale saturates infinity)."""
    assert answers["nan"] == {"token": [1, 2], "static": [1]}


@pytest.mark.parametrize(
    ("row", "changes", "field"),
    [
        ("w8a8", {"rounds": "int8 tensor"}, "rounds"),
        ("w8a8", {"rounds": "int8 token group=64"}, "rounds"),
        ("w8a8", {"rounds": "int4 token"}, "rounds"),
        ("w8a8", {"rounds": ""}, "rounds"),
        ("w8a8", {"rounds": "int8 token limit"}, "rounds"),
        ("w8a8", {"asym": True}, "asym"),
        ("w8a8", {"group": 48}, "group"),
        ("w8a8", {"bits": 9}, "bits"),
        ("w8a8", {"bits": 4}, "bits"),
        ("w4a8", {}, "bits"),
        ("w8a8", {"n": 2, "m": 4}, "m"),
        ("w8a8", {"K": 15}, "K"),
        ("w8a8", {"outliers": 4}, "outliers"),
        ("w8a8", {"rank": 8}, "rank"),
        ("w8a8", {"weights": "dense"}, "weights"),
        ("w8a8", {"scale_dtype": "fp32"}, "scale_dtype"),
        ("int8_split", {}, "outliers"),
        ("int8_split", {"outliers": 4097}, "outliers"),
        ("w8a8_codes", {}, "rounds"),
        ("fp8", {"weights": "table", "levels": "e5m2", "rounds": "e4m3 token"}, "levels"),
        ("fp8", {"weights": "table", "levels": "e4m3", "rounds": "e5m2 token"}, "rounds"),
        ("fp8", {"weights": "table", "levels": "e4m3"}, "rounds"),
    ],
)  # fmt: skip
def test_near_misses_are_refused_by_field(row: str, changes: dict[str, Any], field: str) -> None:
    """A row names the field that it cannot serve."""
    from llmc.codegen.kernels import row as by_name

    base = problem_of(Case("w8a8", 1, 64, 128))
    problem = dataclasses.replace(base, **changes)
    assert field in [m.field for m in by_name(row).misfits(problem)]


def test_rounded_inputs_choose_their_row() -> None:
    """A linear that rounds its input meets no kernel that would not."""
    from llmc.codegen.kernels import choose

    base = problem_of(Case("w8a8", 1, 64, 128))
    for changes, name in [
        ({}, "w8a8"),
        ({"outliers": 3, "rounds": "int8 token limit=2.5"}, "int8_split"),
        ({"bits": 4, "group": 32}, "w4a8"),
        ({"bits": 6, "group": 32}, "w8a8"),
        ({"weights": "table", "levels": "e4m3", "rounds": "e4m3 token"}, "fp8"),
    ]:
        row, _ = choose(dataclasses.replace(base, **changes))
        assert row is not None
        assert row.name == name


def test_floats_of_eight_bits_are_refused_where_the_machine_has_none() -> None:
    """sm_80 multiplies no e4m3: the refusal names the target, x is rounded to floats of its own
    dtype instead where no column stays apart, and int8 goes on."""
    from llmc.codegen.kernels import choose
    from llmc.codegen.targets import triton_accept

    base = problem_of(Case("fp8", 1, 64, 128, rounds="e4m3 token"))
    found, _ = choose(base, "sm_80")
    assert found is not None
    assert found.name == "w8_float"
    apart = dataclasses.replace(base, outliers=5)
    found, why = choose(apart, "sm_80")
    assert found is None
    assert "fp8: target=sm_80, expected sm_90" in [str(m) for m in why]
    assert "w8_float: outliers=5, expected 0" in str(triton_accept(apart, "sm_80"))
    assert triton_accept(base, "sm_90") is None
    assert choose(base, "sm_90")[0] is not None
    assert choose(problem_of(Case("w8a8", 1, 64, 128)), "sm_80")[0] is not None


def test_source_does_not_hold_the_limit() -> None:
    """Layers differ by their limits alone, and share one kernel."""
    from llmc.codegen.kernels import row
    from llmc.codegen.render import render

    base = problem_of(Case("w8a8", 1, 64, 128))
    sources = {
        render(row("w8a8"), dataclasses.replace(base, rounds=f"int8 token limit={limit}")).digest
        for limit in (1.5, 6.0, 1e-05)
    }
    assert len(sources) == 1


def test_bytes_count_every_operand_once() -> None:
    """Codes, scales, x, y; then columns apart with their weights."""
    from llmc.codegen.kernels import row

    base = problem_of(Case("w8a8", 1, 4096, 4096))
    assert row("w8a8").bytes_moved(base, 8) == 4096 * 4096 + 4 * 4096 + 2 * 8 * (4096 + 4096)
    apart = dataclasses.replace(base, outliers=40)
    more = row("int8_split").bytes_moved(apart, 8) - row("w8a8").bytes_moved(base, 8)
    assert more == 4096 + 64 * (4 + 2 * (4096 + 8))


# ** the child process **


def _launch(case: Case, parts: dict[str, Any], given: dict[str, Any]) -> Any:
    from llmc.codegen.kernels import row
    from llmc.codegen.launch import fused_linear
    from llmc.codegen.prepack import prepack
    from llmc.codegen.row import TileConfig

    packed = prepack(row(case.row), problem_of(case), **parts)
    return fused_linear(packed, **given, config=TileConfig(*case.tile) if case.tile else None)


def _answer(case: Case) -> dict[str, Any]:
    """Errors of one case as shares of their bound."""
    import torch

    from llmc.compiler.ir import packing

    parts = parts_of(case)
    given = inputs_of(case, parts)
    exact, bound = expected(case, parts, given)
    y = _launch(case, parts, given)
    ratio = float(((y.double() - exact).abs() / bound).nan_to_num(1e9).max())
    if case.M >= 19:
        return {"ratio": ratio}
    q = packing.unpack(parts["codes"], case.bits, case.K).to(torch.int64)
    # The largest input that is a code, in a column that is not kept apart.
    size = given["x"][0].float().abs()
    if case.outliers:
        size[parts["columns"]] = 0.0
    at = size.argmax()
    q[0, at] = q[0, at] ^ (1 << (case.bits - 2))
    if case.rounds.startswith("e"):
        q[0, at] = 0x78 if q[0, at] & 0x40 else 0  # 256 or nothing
    off = _launch(case, {**parts, "codes": packing.pack(q, case.bits)}, given)
    return {
        "ratio": ratio,
        "same_twice": bool(torch.equal(y, _launch(case, parts, given))),
        "spoiled_ratio": float(((off.double() - exact).abs() / bound)[:, 0].max()),
    }


def _round(problem: Any, x: Any, in_scale: Any = None) -> tuple[Any, Any]:
    """Codes and scales of the kernel before a product."""
    import torch

    from llmc.codegen import start
    from llmc.codegen.rows.rounded import ROUND_E4M3, ROUND_INT8, round_config

    floats = problem.rounds.startswith("e")
    dtype = torch.float8_e4m3fn if floats else torch.int8
    y = torch.full((len(x), -(-problem.K // 128) * 128), 7.0).to(dtype)
    scale = torch.zeros(len(x))
    given = {"x": x, "y": y, "x_scale": scale, "in_scale": in_scale}
    row = ROUND_E4M3 if floats else ROUND_INT8
    start.launch_row(row, problem, round_config(problem.K), len(x), given, grid=(1, len(x)))
    return y, scale


def _codes(rounds: str) -> dict[str, bool]:
    """The prologue beside `round_input` in fp32 (and of bf16): equal codes, equal scales."""
    import torch

    from llmc.codegen.grids import parse
    from llmc.codegen.problem import Problem
    from llmc.compiler.ir.ops.rounding import round_input

    g = torch.Generator().manual_seed(0)
    grid = parse(rounds)
    assert grid is not None
    same, scales, padding = True, True, True
    for K, dtype in ((100, "fp32"), (2100, "bf16")):
        x = torch.randn(6, K, generator=g) * torch.logspace(-30, 4, 6)[:, None]
        x[0] = 0.0
        x[1, :9] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5, 125.5])
        x = x.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
        in_scale = torch.tensor([0.25]) if grid.per == "static" else None
        y, scale = _round(Problem(1, K, x_dtype=dtype, rounds=rounds), x, in_scale)
        how: Any = {"kind": grid.kind, "bits": 8, "per": grid.per, "power": grid.power}
        reference = round_input(x.float(), in_scale, **how)
        codes = y.float()[:, :K]
        same = same and torch.equal(codes * scale[:, None], reference)
        unit = in_scale if in_scale is not None else scale[:, None]
        scales = scales and torch.equal((reference / unit).round() if grid.kind == "int" else codes,
                                        codes)  # fmt: skip
        padding = padding and not y.float()[:, K:].any()
    return {"codes": same, "scale": scales, "padding": padding}


def _nan() -> dict[str, list[int]]:
    import torch

    found = {}
    for per in ("token", "static"):
        case = Case("w8a8", 4, 64, 128, rounds=f"int8 {per}", dtype="fp32")
        parts = parts_of(case)
        given = inputs_of(case, parts)
        given["x"][1, 5], given["x"][2, 6] = float("nan"), float("inf")
        for tile in ((8, 64), None):
            y = _launch(dataclasses.replace(case, tile=tile), parts, given)
            bad = [i for i in range(4) if bool(torch.isnan(y[i]).all())]
            assert bad == [i for i in range(4) if bool(torch.isnan(y[i]).any())]
            assert found.setdefault(per, bad) == bad
    return found


def _launches() -> dict[str, Any]:
    """The same call in one launch and in two, and how many kernels ran."""
    import torch

    from llmc.codegen import start
    from llmc.codegen.rows import rounded

    counted: list[list[str]] = []
    plain = start.function

    def counting(rendered: Any) -> Any:
        counted[-1].append(rendered.row)
        return plain(rendered)

    start.function = counting  # type: ignore[assignment]
    case = Case("int8_split", 3, 70, 300, 32, outliers=5, smooth=True, bias=True, spike=True,
                rounds="int8 token limit=8.0", dtype="fp32")  # fmt: skip
    parts = parts_of(case)
    found = []
    for again in (rounded.AGAIN, 0):
        rounded.AGAIN = again
        counted.append([])
        found.append(_launch(case, parts, inputs_of(case, parts)))
    start.function = plain
    return {"kernels": [len(c) for c in counted], "same": bool(torch.equal(*found))}


def main() -> None:
    """Answer everything as JSON on stdout."""
    import torch

    torch.set_num_threads(1)
    answers: dict[str, Any] = {case.label: _answer(case) for case in CASES}
    answers["codes"] = {n: _codes(n) for n in CODES}
    answers["nan"] = _nan()
    answers["launches"] = _launches()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
