"""A kernel of your own: one row that says what it serves, one template that decodes its weights.

    python examples/own_kernel.py

Binary weights, as the pass `binary` makes them, are multiplied by signs in llmc's own kernel; this
file puts a simpler one in its place, which decodes them. A row of your own is asked first.
The template extends the shipped one for decoded weights, so that norm, bias, activation, gate, low
rank, sparse entries, residual and split columns come with it. Without a GPU it runs under Triton's
interpreter and is compiled ahead of time for sm_90.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from llmc.codegen import meaning
from llmc.codegen.kernels import choose, register
from llmc.codegen.prepack import pad, prepack, scale_tiles
from llmc.codegen.problem import Problem, Requirement
from llmc.codegen.row import TILE_ROWS, Argument, KernelRow
from llmc.codegen.rows.common import CHOICES, SCALE, SIDES, SPLITS, linear_args
from llmc.compiler.ir import packing

TEMPLATE = """{# constants: x_dtype #}
{% extends "_weight.py.j2" %}
{% block about %}
# y[M, N] = X[M, K] @ W[N, K]^T, W = scale or -scale, one bit each.
{% endblock %}
{% block pointers %}
    # A tile is 64 rows x 16 bytes: bit 2 j + e of byte w belongs to column 32 j + 2 w + e.
    code_ptrs = codes_ptr + (tile * (STEPS * 1024) + lane * 16)[:, None] + word[None, :]
{% endblock %}
{% block load %}
        bits = tl.load(code_ptrs + step * 1024).to(tl.int32)
{% endblock %}
{% block decode %}
            negative = (bits >> (2 * j)) ^ 3
            signs = ((negative & 1) << 15) | ((negative & 2) << 30)
            w = _pair({{ "0x3F803F80" if x_dtype == "bf16" else "0x3C003C00" }} | signs, BN, WIDTH)
{% endblock %}
"""


def pack(row, problem, parts):
    """Codes [N, words] -> int8 [Np/64, Kp/128, 64, 16]."""
    q = pad(packing.unpack(parts["codes"], 1, problem.K).to(torch.int64), TILE_ROWS, row.step)
    q = q.reshape(q.shape[0] // TILE_ROWS, TILE_ROWS, -1, 4, 16, 2).permute(0, 2, 1, 4, 3, 5)
    whole = (q.flatten(-2) << torch.arange(8)).sum(-1)
    return {
        "codes": whole.to(torch.uint8).view(torch.int8),
        "scale": scale_tiles(row, problem, parts),
    }


W1A16 = KernelRow(
    name="w1a16",
    op="llmc.fused",
    template="own/w1a16.py.j2",
    summary="binary weights: the scale of the group or its negative",
    args=linear_args(Argument("codes", "[Np/64, Kp/128, 64, 16]", ("i8",), dtype="i8"), SCALE),
    step=128,
    choices={**CHOICES, "weights": ("table",), "levels": ("binary",), "asym": (False,)},
    requires=(
        Requirement("bits", "Eq(bits, 1)", "1"),
        Requirement("m", "Eq(m, 0)", "0 (dense)"),
        Requirement("group", "Eq(Mod(group, 128), 0) | Eq(group, 32) | Eq(group, 64)",
                    "32, 64, a multiple of 128, or one scale per row"),
    ),
    moves=f"Np*Kp/8 + {SIDES}",
    tiles=((8, 32), (8, 64), (16, 64)),
    stages=(3, 4),
    fits=("Eq(wide, 0) | (BM <= 16)",),
    pack=pack,
    splits=SPLITS,
)  # fmt: skip


def main() -> None:
    """Ask for a kernel, add one, and prove it against what the problem means."""
    problem = Problem(96, 384, weights="table", levels="binary", bits=1, bias=True, norm=True,
                      eps=1e-5)  # fmt: skip
    if "--compile" in sys.argv:
        from llmc.codegen.aot import compile_variant

        register(W1A16, TEMPLATE)
        facts = compile_variant(W1A16, problem, W1A16.default_config(problem, 1), "sm_90")
        print(f"sm_90: {facts.registers} registers, {facts.stack} bytes of stack, "
              f"{facts.slots} issue slots per weight, {' '.join(facts.matrix)}")  # fmt: skip
        return
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from llmc.codegen.launch import fused_linear

    row, why = choose(problem)
    print("before:", row.name if row else f"no row, {why[0]}")
    register(W1A16, TEMPLATE)
    row, _ = choose(problem)
    assert row is not None
    print("after: ", row.name, "moves", row.bytes_moved(problem, 1), "bytes for one token")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    parts = {
        "codes": packing.pack(torch.randint(0, 2, (96, 384), generator=g), 1),
        "scale": (torch.rand(96, 3, generator=g) * 0.05 + 0.01).half(),
        "bias": torch.randn(96, generator=g).half(), "gain": torch.rand(384, generator=g) + 0.5,
    }  # fmt: skip
    parts = {name: t.to(device) for name, t in parts.items()}
    x = torch.randn(3, 384, generator=g).half().to(device)
    y = fused_linear(prepack(row, problem, **parts), x)
    wanted = meaning.linear(problem, parts, x.double())
    print(
        f"error {float((y.double() - wanted).abs().max() / wanted.abs().max()):.1e} of the largest"
    )
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, __file__, "--compile"], env=own, check=True)


if __name__ == "__main__":
    main()
