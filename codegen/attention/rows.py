"""The rows of cached attention, in order of preference: one template, a cache each."""

from __future__ import annotations

from ...compiler.ir.errors import UsageError, nearest
from ..problem import Misfit, Requirement
from .problem import QUERIES, AttentionProblem
from .row import AttentionRow

_WORDS = "a multiple of 4, whole words of codes"
_CHOICES: dict[str, tuple[object, ...]] = {
    "x_dtype": ("fp16", "bf16", "fp32"),
    "bias": (False,),
    "turned": (False,),
    "latent": (False,),
}
_REQUIRES = (
    Requirement("heads", "Eq(Mod(heads, kv_heads), 0)", "a multiple of kv_heads"),
    Requirement("queries", f"(queries >= 1) & (queries <= {QUERIES})", f"1 to {QUERIES}"),
    Requirement("D", "(D >= 1) & (D <= 256)", "1 to 256"),
    Requirement("E", "(E >= 1) & (E <= 256)", "1 to 256"),
    # Three products of tf32 for one of fp32 leave no registers for more.
    Requirement("D", "Eq(wide, 0) | (D + E <= 256)", "at most 256 together with E, in fp32"),
)
_SIDES = "xb*B*S*heads*(D + E) + 8*B*(T + S) + B*T*valid + (xb*sinks + 4*slopes)*heads"
_NEW = "xb*B*kv_heads*S*(D + E)"
_FITS = ("(BM < 64) | (BT <= 32)", "Eq(wide, 0) | (BT <= 32)", "Eq(wide, 0) | (BM * BT <= 512)")

KV = AttentionRow(
    name="attention_kv",
    template="attention.py.j2",
    summary="keys and values as they come, in runs of tokens that the last program joins",
    choices={**_CHOICES, "cache": ("kv",)},
    requires=_REQUIRES,
    moves=f"xb*B*kv_heads*T*(D + E) + {_SIDES}",
    fits=_FITS,
)
_BYTES = (
    f"B*kv_heads*T*(D + E + 2 + 2*per_token) + 4*kv_heads*D*(1 - per_token) + {_NEW} + {_SIDES}"
)
_EIGHT = (
    *_REQUIRES,
    Requirement("D", "Eq(Mod(D, 4), 0)", _WORDS),
    Requirement("E", "Eq(Mod(E, 4), 0)", _WORDS),
)
INT8 = AttentionRow(
    name="attention_int8",
    template="attention.py.j2",
    summary="int8 keys, a scale per channel in the queries or per token on the scores; int8 "
    "values, their scale in the weights",
    choices={**_CHOICES, "cache": ("int8",), "keys": ("channel", "token")},
    requires=_EIGHT,
    moves=_BYTES,
    fits=_FITS,
)
FP8 = AttentionRow(
    name="attention_fp8",
    template="attention.py.j2",
    summary="e4m3 keys and values, shifted into the bits of fp16, so that sm_80 serves them too",
    choices={**_CHOICES, "cache": ("fp8",), "keys": ("channel", "token")},
    requires=_EIGHT,
    moves=_BYTES,
    fits=_FITS,
)
KIVI = AttentionRow(
    name="attention_kivi",
    template="attention.py.j2",
    summary="2-, 4- or 8-bit keys in groups of tokens per channel, values in groups of channels "
    "per token, the newest as they came",
    choices={
        **_CHOICES,
        "counted": (False,),
        "cache": ("kivi",),
        "keys": ("group",),
        "bits": (2, 4, 8),
    },
    requires=(
        *_REQUIRES,
        Requirement("group", "(group >= 16) & Eq(Mod(group, 16), 0)", "a multiple of 16"),
        Requirement("E", "(E <= group) | Eq(Mod(E, group), 0)", "whole groups of channels"),
    ),
    moves="B*kv_heads*T*((D + E)*bits/8 + 4*D/group + 4*E/vgroup) "
    f"+ xb*B*kv_heads*residual*(D + E) + {_NEW} + {_SIDES}",
    fits=(*_FITS, "Eq(Mod(group, BT), 0)"),
    note="scales meet codes as fp16 pairs: as cheap as in the queries, where groups are short",
)

ROWS: tuple[AttentionRow, ...] = (KV, INT8, FP8, KIVI)


def row(name: str) -> AttentionRow:
    """The row called `name`; UsageError with the nearest name when there is none."""
    known = [r.name for r in ROWS]
    if name not in known:
        raise UsageError(
            f"no attention row {name!r}, rows are {', '.join(known)}", hint=nearest(name, known)
        )
    return ROWS[known.index(name)]


def choose(problem: AttentionProblem) -> tuple[AttentionRow | None, list[Misfit]]:
    """The row that serves `problem`, or None with what its cache's row misses.

    A cache that no row is for is refused by the field ``cache``.
    """
    mine = [r for r in ROWS if problem.cache in r.choices["cache"]]
    if not mine:
        known = " or ".join(str(r.choices["cache"][0]) for r in ROWS)
        return None, [Misfit("attention", "cache", problem.cache, known)]
    why = mine[0].misfits(problem)
    return (None, why) if why else (mine[0], [])
