"""What the rows of linear kernels share: their arguments, choices and side bytes."""

from __future__ import annotations

from ..ending import Sections
from ..grids import Made
from ..mixture.choice import Routes
from ..problem import read_spans
from ..row import Argument

FLOATS = ("fp16", "bf16", "fp32")


class UpTo(tuple[object, ...]):
    """Choices of a count: ``least`` to ``most``."""

    least: int
    most: int

    def __new__(cls, most: int, least: int = 0) -> UpTo:
        made = super().__new__(cls, (f"{least} to {most}",))
        made.least, made.most = least, most
        return made

    def __contains__(self, count: object) -> bool:
        return isinstance(count, int) and self.least <= count <= self.most


class Spans(tuple[object, ...]):
    """Choices of `spans`: none, or any sections (what they must be, every row asks)."""

    def __new__(cls) -> Spans:
        return super().__new__(cls, ("", "rows x rank of each section"))

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and (not text or bool(read_spans(text)))


# What needs whole rows of the result: a norm its gain and the squares of their parts, a result that
# is mixed back what multiplies it; and how many programs have left theirs.
NORMED = (
    Argument("out_gain", "[out]", FLOATS, "out_norm", dtype="fp32"),
    Argument("turn", "[N]", ("fp32",), "out_mixed", dtype="fp32"),
    Argument("whole", "[rows]", ("fp32",), "gathered", dtype="fp32"),
    Argument("arrived", "[tiles of tokens]", ("i32",), "gathered", dtype="i32"),
)

# What experts need: the router, what its scores are added to, all pairs of a token and an expert in
# the order of experts, where each pair lies among them, where each expert's begin, and the weight
# of each pair.
ROUTED = (
    Argument("router", "[experts, K]", FLOATS, "near_router"),
    Argument("router", "[experts, K]", ("fp32",), "wide_router", dtype="fp32"),
    Argument("correction", "[experts]", FLOATS, "corrected", dtype="fp32"),
    Argument("order", "[M*chosen]", ("i32",), "routed", dtype="i32"),
    Argument("where", "[M*chosen]", ("i32",), "routed", dtype="i32"),
    Argument("starts", "[experts + 1]", ("i32",), "routed", dtype="i32"),
    Argument("shares", "[M*chosen]", ("fp32",), "routed", dtype="fp32"),
)
# What an input needs that the kernel makes itself: what its grid has stored, where all programs
# find it, and how many have made their part.
MADE = (
    Argument("shift", "[K]", ("fp32",), "centred_before", dtype="fp32"),
    Argument("in_scale", "[groups]", ("fp32",), "static", dtype="fp32"),
    Argument("limit", "[1]", ("fp32",), "limited", dtype="fp32"),
    Argument("made", "[M, K]", FLOATS, "made"),
    Argument("between", "[M, K]", ("fp32",), "mixed_twice", dtype="fp32"),
    Argument("makers", "[2 * tiles of tokens]", ("i32",), "made", dtype="i32"),
)
UNROUTED: dict[str, tuple[object, ...]] = {"routed": ("",), "route": ("",)}


def linear_args(*weight: Argument) -> tuple[Argument, ...]:
    """x, the tensors of the weight, every side input and y, in the order of the signature."""
    return (
        Argument("x", "[M, K]", FLOATS, strided=True),
        *weight,
        Argument("bias", "[N]", FLOATS, "bias"),
        Argument("residual", "[M, out]", FLOATS, "residual", strided=True),
        Argument("gain", "[K]", FLOATS, "gained", dtype="fp32"),
        Argument("centre", "[Np, 2]", ("fp32",), "centred_behind", dtype="fp32"),
        Argument("left", "[Lp]", FLOATS, "rank"),
        Argument("right", "[Rp, Kp]", FLOATS, "rank"),
        Argument("entry_starts", "[Np/64 + 1]", ("i32",), "sparse", dtype="i32"),
        Argument("entry_index", "[entries, 64]", ("i16", "i32"), "sparse", dtype="i16"),
        Argument("entry_values", "[entries, 64]", FLOATS, "sparse"),
        *NORMED,
        *ROUTED,
        *MADE,
        Argument("scratch", "[parts]", ("fp32",), dtype="fp32"),
        Argument("counts", "[tiles]", ("i32",), dtype="i32"),
        Argument("y", "[M, out]", FLOATS, strided=True),
    )


SCALE = Argument("scale", "[Np/64, Gp, 64]", ("i32",), dtype="i32")
# Bytes of everything around a weight; beside it, four per group hold scale and zero point.
AROUND = "xb*M*K + xb*M*out*(1 + residual) + xb*N*bias + 4*K*Max(norm, smooth)"
AROUND += " + 8*Np*centred*(1 - made) + (2*xb*M + 4*centred)*K*made"
AROUND += " + xb*(Lp + Rp*128*ceiling(K/128)) + 4*out*out_norm + 4*N*turned"
SIDES = f"{AROUND} + 4*Gp*Np"
# Programs that may share a tile's columns, for templates that loop from LO to HI.
SPLITS = (1, 2, 4, 8)
# What plain Triton and its interpreter can compute.
ACTS = ("", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh")
# What the shared includes of the templates serve.
CHOICES: dict[str, tuple[object, ...]] = {
    "x_dtype": FLOATS,
    "scale_dtype": ("fp16", "bf16"),
    **dict.fromkeys(("asym", "bias", "residual", "norm", "centred", "smooth"), (False, True)),
    "mixed": (False, True),
    "out_norm": (False, True),
    "out_mixed": Sections(),
    "act": ACTS,
    "pairs": ("", "gate"),
    "rank": UpTo(1024),
    "sparse": (False, True),
    "spans": Spans(),
    "rounds": Made(),
    "routed": ("", "up", "down"),
    "route": Routes(),
}
