"""What the rows of linear kernels share: their arguments, choices and side bytes."""

from __future__ import annotations

from ..row import Argument

FLOATS = ("fp16", "bf16", "fp32")


def linear_args(*weight: Argument) -> tuple[Argument, ...]:
    """x, the tensors of the weight, every side input and y, in the order of the signature."""
    return (
        Argument("x", "[M, K]", FLOATS, strided=True),
        *weight,
        Argument("bias", "[N]", FLOATS, "bias"),
        Argument("residual", "[M, out]", FLOATS, "residual", strided=True),
        Argument("gain", "[K]", FLOATS, "gained", dtype="fp32"),
        Argument("y", "[M, out]", FLOATS, strided=True),
    )


SCALE = Argument("scale", "[Np/64, Gp, 64]", ("i32",), dtype="i32")
# Bytes of everything but the weight; four bytes per group hold scale and zero point.
SIDES = "xb*M*K + xb*M*out*(1 + residual) + 4*Gp*Np + xb*N*bias + 4*K*Max(norm, smooth)"
# What plain Triton and its interpreter can compute.
ACTS = ("", "silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")
# What the shared includes of the templates serve.
CHOICES: dict[str, tuple[object, ...]] = {
    "x_dtype": FLOATS,
    "scale_dtype": ("fp16", "bf16"),
    **dict.fromkeys(("asym", "bias", "residual", "norm", "smooth"), (False, True)),
    "act": ACTS,
    "pairs": ("", "gate"),
}
