"""The cases of `test_rows_weights`, family by family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numerics import Case

from llmc.codegen.kernels import row
from llmc.codegen.row import TileConfig

Fields = dict[str, Any]
ALL_SIDES: Fields = {"bias": True, "residual": True, "norm": True, "eps": 1e-5}
GATE: Fields = {"pairs": "gate", "act": "silu"}
ALL: list[str] = []
CASES: list[Case] = []
# Row, problem that is served, change, field that the refusal names.
MISSES: list[tuple[str, Fields, Fields, str]] = []
# Row, problem, tile, target, the most issue slots per weight and stores to shared memory; the
# first of each row is compiled in every run.
FACTS: list[tuple[str, Fields, TileConfig, str, float, int]] = []
# Problems whose every tile must compile without spills.
TILED: dict[str, list[Fields]] = {}


def case(name: str, M: int, N: int, K: int, spoil: str = "codes", **fields: Any) -> Case:
    """A case; "stride" goes beside the problem's fields."""
    own = {k: fields.pop(k) for k in ("stride",) if k in fields}
    return Case(name, {"N": N, "K": K, **fields}, M, spoil=spoil, **own)


def family(name: str, base: Fields, cases: list[Case], tiled: Fields) -> None:
    """Register a row's cases: those given, the first of them at the tile that a call would take
    (its columns are split) and the others at a small one, and one case for each tile."""
    ALL.append(name)
    CASES.append(cases[0])
    CASES.extend(replace(c, tile=(8, 64)) for c in cases[1:])
    for tile in row(name).tiles:
        made = case(name, 9, max(tile[1], 64), spoil="", **{**base, **tiled})
        CASES.append(replace(made, tile=tile))


def grid(base: Fields, *, zeros: bool = True, wide: bool = True) -> list[Fields]:
    """Schemes over a row's features: least groups with all sides, whole rows, each dtype."""
    schemes: list[Fields] = [
        {"group": 32, "x_dtype": "fp16", "asym": zeros, **ALL_SIDES},
        {"group": 32, "x_dtype": "bf16", "asym": zeros},
        {"group": 64, "x_dtype": "bf16", **ALL_SIDES},
        {"group": 128, "x_dtype": "fp16"},
        {"group": 0, "x_dtype": "bf16", "asym": zeros, **ALL_SIDES},
    ]
    if wide:
        schemes.append({"group": 32, "x_dtype": "fp32", "asym": zeros, **ALL_SIDES})
    return [{**base, **s} for s in schemes]


# ** 8-bit integers **
W8: Fields = {"bits": 8}
family("w8a16", W8, [
    case("w8a16", 1, 33, 96, **W8, group=32),
    case("w8a16", 3, 70, 200, **W8, group=64, asym=True, spoil="zero"),
    case("w8a16", 9, 65, 300, **W8, group=128, asym=True),
    case("w8a16", 3, 64, 600, **W8, group=256, spoil="scale"),
    case("w8a16", 2, 1, 130, **W8, group=0, asym=True, x_dtype="fp32", stride="padded"),
    case("w8a16", 2, 70, 260, **W8, group=64, asym=True, x_dtype="bf16", scale_dtype="bf16"),
    case("w8a16", 1, 40, 260, **W8, x_dtype="bf16", stride="halves", residual=True),
    case("w8a16", 3, 66, 200, **W8, group=64, asym=True, **ALL_SIDES, **GATE, smooth=True),
    case("w8a16", 3, 35, 137, **W8, group=16, asym=True, x_dtype="bf16", spoil="zero"),
], {"K": 96, "asym": True, "group": 32})  # fmt: skip
MISSES += [
    ("w8a16", W8, {"bits": 7}, "bits"),
    ("w8a16", W8, {"group": 48}, "group"),
    ("w8a16", W8, {"group": 8}, "group"),
    ("w8a16", W8, {"K": 15}, "K"),
    ("w8a16", W8, {"n": 2, "m": 4, "group": 64}, "m"),
    ("w8a16", W8, {"weights": "table", "levels": "e4m3"}, "weights"),
]
FACTS += [
    ("w8a16", W8, TileConfig(8, 64), "sm_80", 4.0, 2),
    ("w8a16", W8, TileConfig(16, 128), "sm_90", 3.6, 2),
    ("w8a16", W8 | {"asym": True, "x_dtype": "bf16"}, TileConfig(16, 128), "sm_90", 5.4, 2),
]
TILED["w8a16"] = grid(W8)

# ** small floats **
F8: Fields = {"bits": 8, "weights": "table", "levels": "e4m3"}
F4: Fields = {"weights": "table", "levels": "e2m1"}
family("w8_float", F8, [
    case("w8_float", 1, 33, 96, **F8, group=32),
    case("w8_float", 3, 35, 200, **F8 | {"levels": "e5m2"}, group=64, spoil="scale"),
    case("w8_float", 9, 33, 300, **F8 | {"levels": "e5m2"}, group=128, x_dtype="bf16"),
    case("w8_float", 2, 64, 300, **F8, group=256, x_dtype="bf16", stride="halves"),
    case("w8_float", 2, 1, 130, **F8, group=0, scale_dtype="", stride="padded"),
    case("w8_float", 2, 34, 200, **F8, x_dtype="fp32", **ALL_SIDES, **GATE),
], {"K": 96, "group": 32})  # fmt: skip
family("w4_float", F4, [
    case("w4_float", 1, 33, 96, **F4, group=32),
    case("w4_float", 3, 35, 200, **F4, group=64, spoil="scale"),
    case("w4_float", 9, 33, 300, **F4, group=128, x_dtype="bf16"),
    case("w4_float", 2, 1, 130, **F4, group=0, scale_dtype="", x_dtype="fp32", stride="padded"),
    case("w4_float", 2, 34, 200, **F4, group=32, **ALL_SIDES, **GATE, smooth=True),
], {"K": 96, "group": 32})  # fmt: skip
MISSES += [
    ("w8_float", F8, {"levels": "nf"}, "levels"),
    ("w8_float", F8, {"asym": True}, "asym"),
    ("w8_float", F8, {"group": 48}, "group"),
    ("w4_float", F4, {"bits": 3}, "bits"),
    ("w4_float", F4, {"group": 24}, "group"),
    ("w4_float", F4, {"m": 4, "n": 2, "group": 64}, "m"),
]
FACTS += [
    ("w8_float", F8, TileConfig(8, 64), "sm_80", 4.5, 2),
    ("w8_float", F8 | {"x_dtype": "bf16"}, TileConfig(16, 128), "sm_90", 4.1, 2),
    ("w4_float", F4 | {"group": 32}, TileConfig(16, 128), "sm_90", 4.3, 2),
    ("w4_float", F4 | {"x_dtype": "bf16"}, TileConfig(8, 64), "sm_80", 4.2, 2),
]
TILED["w8_float"] = grid(F8, zeros=False)
TILED["w4_float"] = grid(F4, zeros=False)

# ** looked-up levels, and integers of 3 and 2 bits **
NF4: Fields = {"weights": "table", "levels": "nf"}
NF3, NF2 = NF4 | {"bits": 3}, NF4 | {"bits": 2}
STORED: Fields = {"weights": "table", "table": "row", "scale_dtype": "", "group": 0}
W3: Fields = {"bits": 3}
W2: Fields = {"bits": 2}
family("w4_lut", NF4, [
    case("w4_lut", 1, 33, 96, **NF4, group=32),
    case("w4_lut", 3, 35, 200, **NF4 | {"levels": "midrise"}, group=64, spoil="scale"),
    case("w4_lut", 9, 33, 300, **STORED, x_dtype="bf16", spoil="table"),
    case("w4_lut", 2, 1, 130, **STORED | {"table": "matrix"}, stride="padded"),
    case("w4_lut", 2, 34, 200, **NF4, **ALL_SIDES, **GATE, smooth=True),
    case("w4_lut", 3, 35, 100, **NF4, group=16, spoil="scale"),
], {"K": 96, "group": 32})  # fmt: skip
family("w3_lut", NF3, [
    case("w3_lut", 1, 33, 96, **NF3, group=32),
    case("w3_lut", 3, 35, 300, **STORED, bits=3, x_dtype="bf16"),
    case("w3_lut", 2, 34, 300, **NF3, group=256, **ALL_SIDES, **GATE),
], {"K": 192, "group": 32})  # fmt: skip
family("w2_lut", NF2, [
    case("w2_lut", 1, 33, 96, **NF2 | {"levels": "ternary"}, group=32),
    case("w2_lut", 3, 35, 300, **STORED | {"table": "matrix"}, bits=2, spoil="table"),
    case("w2_lut", 2, 34, 300, **NF2, group=64, x_dtype="bf16", **ALL_SIDES, **GATE),
], {"K": 192, "group": 32})  # fmt: skip
family("w3a16", W3, [
    case("w3a16", 1, 33, 96, **W3, group=32),
    case("w3a16", 3, 35, 300, **W3, group=64, asym=True, spoil="zero"),
    case("w3a16", 9, 33, 300, **W3, group=128, asym=True, x_dtype="bf16"),
    case("w3a16", 3, 64, 520, **W3, group=256, spoil="scale"),
    case("w3a16", 2, 1, 130, **W3, group=0, asym=True, x_dtype="fp32", stride="padded"),
    case("w3a16", 2, 34, 300, **W3, asym=True, **ALL_SIDES, **GATE, smooth=True),
    case("w3a16", 3, 35, 137, **W3, group=16, asym=True, spoil="zero"),
    case("w3a16", 2, 34, 100, **W3, group=16, x_dtype="fp32", **ALL_SIDES, **GATE),
], {"K": 192, "asym": True, "group": 32})  # fmt: skip
family("w2a16", W2, [
    case("w2a16", 1, 33, 96, **W2, group=32),
    case("w2a16", 3, 35, 300, **W2, group=64, asym=True, spoil="zero"),
    case("w2a16", 9, 33, 300, **W2, group=0, asym=True, x_dtype="bf16", scale_dtype="bf16"),
    case("w2a16", 2, 1, 130, **W2, group=256, x_dtype="fp32", stride="halves"),
    case("w2a16", 2, 34, 300, **W2, asym=True, **ALL_SIDES, **GATE),
    case("w2a16", 3, 35, 100, **W2, group=16, x_dtype="bf16", spoil="scale"),
], {"K": 192, "asym": True, "group": 32})  # fmt: skip
MISSES += [
    ("w4_lut", NF4, {"levels": "e2m1"}, "levels"),
    ("w4_lut", NF4, {"x_dtype": "fp32"}, "x_dtype"),
    ("w4_lut", NF4, {"asym": True}, "asym"),
    ("w3_lut", NF3, {"levels": "ternary"}, "levels"),
    ("w3_lut", NF3, {"bits": 5}, "bits"),
    ("w2_lut", NF2, {"weights": "int", "levels": ""}, "weights"),
    ("w3a16", W3, {"group": 8}, "group"),
    ("w3a16", W3, {"group": 24}, "group"),
    ("w3a16", W3, {"group": 48}, "group"),
    ("w3a16", W3, {"group": 192}, "group"),
    ("w3a16", W3, {"group": 384}, "group"),
    ("w3a16", W3, {"m": 4, "n": 2, "group": 64}, "m"),
    ("w2a16", W2, {"bits": 1}, "bits"),
    ("w2a16", W2, {"group": 24}, "group"),
    ("w2a16", W2, {"weights": "table", "levels": "nf"}, "weights"),
]
FACTS += [
    ("w4_lut", NF4 | {"group": 64}, TileConfig(16, 64), "sm_90", 5.6, 2),
    ("w4_lut", STORED, TileConfig(8, 64), "sm_80", 4.7, 2),
    ("w3_lut", NF3, TileConfig(8, 64), "sm_90", 3.7, 2),
    ("w3a16", W3 | {"asym": True}, TileConfig(16, 128), "sm_90", 3.5, 2),
    ("w3a16", W3 | {"x_dtype": "bf16"}, TileConfig(8, 64), "sm_80", 4.4, 2),
    ("w3a16", W3 | {"group": 16}, TileConfig(8, 64), "sm_80", 3.9, 0),
    ("w3a16", W3 | {"group": 16, "asym": True}, TileConfig(8, 64), "sm_90", 5.1, 0),
    ("w2_lut", NF2, TileConfig(8, 64), "sm_90", 3.3, 2),
    ("w2a16", W2 | {"asym": True}, TileConfig(16, 128), "sm_90", 2.8, 2),
    ("w2a16", W2 | {"group": 16, "asym": True}, TileConfig(8, 64), "sm_80", 4.5, 0),
]
TILED["w4_lut"] = [*grid(NF4, zeros=False, wide=False), STORED | {"x_dtype": "bf16"}]
TILED["w3_lut"] = [*grid(NF3, zeros=False, wide=False), STORED | {"bits": 3}]
TILED["w2_lut"] = [*grid(NF2, zeros=False, wide=False), STORED | {"bits": 2}]
TILED["w3a16"] = grid(W3)
TILED["w2a16"] = grid(W2)

# ** integers of 6 and 5 bits **
W6: Fields = {"bits": 6}
W5: Fields = {"bits": 5}
for bits, sizes in ((6, (33, 70)), (5, (35, 66))):
    name, base = f"w{bits}a16", {"bits": bits}
    few, many = sizes
    family(name, base, [
        case(name, 1, few, 96, **base, group=32),
        case(name, 3, many, 200, **base, group=64, asym=True, spoil="zero"),
        case(name, 9, few, 300, **base, group=128, asym=True, x_dtype="bf16"),
        case(name, 3, 64, 520, **base, group=256, x_dtype="bf16", spoil="scale"),
        case(name, 2, 1, 130, **base, group=0, asym=True, x_dtype="fp32", stride="padded"),
        case(name, 2, 34, 200, **base, asym=True, **ALL_SIDES, **GATE, smooth=True),
        case(name, 3, 35, 137, **base, group=16, asym=True, spoil="zero"),
    ], {"K": 96, "asym": True, "group": 32})  # fmt: skip
MISSES += [
    ("w6a16", W6, {"bits": 7}, "bits"),
    ("w6a16", W6, {"group": 48}, "group"),
    ("w6a16", W6, {"m": 4, "n": 2, "group": 64}, "m"),
    ("w6a16", W6, {"weights": "table", "levels": "nf"}, "weights"),
    ("w5a16", W5, {"bits": 4}, "bits"),
    ("w5a16", W5, {"group": 8}, "group"),
    ("w5a16", W5, {"K": 15}, "K"),
]
FACTS += [
    ("w6a16", W6, TileConfig(8, 64), "sm_80", 3.7, 0),
    ("w6a16", W6 | {"asym": True, "x_dtype": "bf16"}, TileConfig(16, 128), "sm_90", 3.9, 0),
    ("w5a16", W5, TileConfig(8, 64), "sm_90", 3.9, 0),
    ("w5a16", W5 | {"asym": True, "group": 16}, TileConfig(8, 64), "sm_80", 5.3, 0),
]
TILED["w6a16"] = grid(W6)
TILED["w5a16"] = grid(W5)

# ** sums of signs **
SIGNS: Fields = {"weights": "signs", "bits": 3}
ONE: Fields = {"weights": "table", "levels": "binary", "bits": 1}
family("w_signs", SIGNS, [
    case("w_signs", 1, 33, 96, "signs", **SIGNS, group=32),
    case("w_signs", 3, 70, 300, "factors", **SIGNS | {"bits": 2}, group=64),
    case("w_signs", 9, 33, 300, "factors", **SIGNS | {"bits": 5}, group=128, x_dtype="bf16"),
    case("w_signs", 3, 64, 520, "signs", **SIGNS | {"bits": 4}, group=256, scale_dtype="bf16"),
    case("w_signs", 2, 1, 130, "signs", **SIGNS, group=0, stride="padded"),
    case("w_signs", 2, 34, 300, "signs", **SIGNS, **ALL_SIDES, **GATE, smooth=True),
    case("w_signs", 2, 66, 100, "factors", **SIGNS | {"bits": 1}, group=0, x_dtype="bf16"),
], {"K": 192, "bits": 1, "group": 64})  # fmt: skip
family("w1_binary", ONE, [
    case("w1_binary", 1, 33, 96, **ONE, group=32),
    case("w1_binary", 3, 70, 300, "scale", **ONE, group=64, x_dtype="bf16"),
    case("w1_binary", 2, 1, 130, **ONE, group=0, scale_dtype="", stride="halves"),
    case("w1_binary", 2, 34, 520, **ONE, group=256, **ALL_SIDES, **GATE),
    case("w1_binary", 2, 34, 100, "scale", **ONE, group=128, x_dtype="fp32", smooth=True),
], {"K": 192, "group": 64})  # fmt: skip
MISSES += [
    ("w_signs", SIGNS, {"bits": 6}, "bits"),
    ("w_signs", SIGNS, {"group": 16}, "group"),
    ("w_signs", SIGNS, {"group": 384}, "group"),
    ("w_signs", SIGNS, {"asym": True}, "asym"),
    ("w_signs", SIGNS, {"scale_dtype": ""}, "scale_dtype"),
    ("w_signs", SIGNS, {"x_dtype": "fp32"}, "x_dtype"),
    ("w_signs", SIGNS, {"weights": "int"}, "weights"),
    ("w_signs", SIGNS, {"m": 4, "n": 2, "group": 64}, "m"),
    ("w1_binary", ONE, {"levels": "ternary"}, "levels"),
    ("w1_binary", ONE, {"bits": 2}, "bits"),
    ("w1_binary", ONE, {"group": 48}, "group"),
]
FACTS += [
    ("w_signs", SIGNS, TileConfig(8, 64), "sm_80", 5.5, 0),
    ("w_signs", SIGNS | {"bits": 2, "x_dtype": "bf16"}, TileConfig(16, 64), "sm_90", 4.2, 0),
    ("w1_binary", ONE, TileConfig(8, 64), "sm_80", 2.4, 0),
    ("w1_binary", ONE | {"group": 0}, TileConfig(16, 128), "sm_90", 2.2, 0),
]
TILED["w_signs"] = [
    {**SIGNS, "bits": b, "group": g, "x_dtype": x, **(ALL_SIDES if sides else {})}
    for b, g, x, sides in [
        (5, 32, "fp16", True), (3, 32, "bf16", False), (3, 128, "fp16", True),
        (2, 128, "bf16", True), (1, 32, "fp16", True), (1, 0, "bf16", True),
        (1, 128, "bf16", False),
    ]
]  # fmt: skip
TILED["w1_binary"] = grid(ONE, zeros=False)

# ** 2:4 sparse weights of 16 and 8 bits **
D24: Fields = {"weights": "dense", "scale_dtype": "", "n": 2, "m": 4}
I24: Fields = {"bits": 8, "n": 2, "m": 4, "group": 64}
family("w16_24", D24, [
    case("w16_24", 1, 33, 96, "values", **D24),
    case("w16_24", 3, 35, 300, "meta", **D24, stride="padded"),
    case("w16_24", 9, 33, 260, "values", **D24, x_dtype="bf16"),
    case("w16_24", 2, 34, 200, "values", **D24, **ALL_SIDES, **GATE, smooth=True),
], {"K": 96})  # fmt: skip
family("w8a16_24", I24, [
    case("w8a16_24", 1, 33, 96, **I24 | {"group": 32}),
    case("w8a16_24", 3, 35, 300, "zero", **I24, asym=True),
    case("w8a16_24", 9, 33, 520, "meta", **I24 | {"group": 128}, x_dtype="bf16", asym=True),
    case("w8a16_24", 2, 1, 132, "scale", **I24 | {"group": 0}, x_dtype="fp32", stride="halves"),
    case("w8a16_24", 2, 34, 300, **I24, asym=True, **ALL_SIDES, **GATE),
], {"K": 192, "group": 32})  # fmt: skip
MISSES += [
    ("w16_24", D24, {"m": 8, "n": 4}, "m"),
    ("w16_24", D24, {"K": 510}, "K"),
    ("w16_24", D24, {"x_dtype": "fp32"}, "x_dtype"),
    ("w16_24", D24, {"scale_dtype": "fp16"}, "scale_dtype"),
    ("w8a16_24", I24, {"n": 1}, "n"),
    ("w8a16_24", I24, {"group": 16}, "group"),
    ("w8a16_24", I24, {"bits": 4}, "bits"),
]
FACTS += [
    ("w16_24", D24, TileConfig(8, 64, 3), "sm_80", 4.1, 2),
    ("w16_24", D24 | {"x_dtype": "bf16"}, TileConfig(16, 128, 3), "sm_90", 3.9, 2),
    ("w8a16_24", I24, TileConfig(16, 128, 3), "sm_90", 4.2, 2),
    ("w8a16_24", I24 | {"asym": True}, TileConfig(8, 64, 3), "sm_80", 5.5, 2),
]
TILED["w16_24"] = [
    {**D24, "x_dtype": "bf16", **ALL_SIDES}, {**D24, "x_dtype": "fp16", "rank": 64},
]  # fmt: skip
TILED["w8a16_24"] = [{**f, "group": 32 if f["group"] == 32 else f["group"] // 2}
                     for f in grid({"bits": 8, "n": 2, "m": 4})]  # fmt: skip

# ** sparse without a pattern **
BITS: Fields = {"weights": "dense", "scale_dtype": "", "bitmap": True}
family("w16_bitmap", BITS, [
    case("w16_bitmap", 1, 33, 96, "values", **BITS),
    case("w16_bitmap", 3, 67, 300, "bitmap", **BITS, stride="padded"),
    case("w16_bitmap", 9, 33, 260, "values", **BITS, x_dtype="bf16"),
    case("w16_bitmap", 2, 34, 200, "values", **BITS, **ALL_SIDES, **GATE, smooth=True),
    case("w16_bitmap", 3, 33, 104, "meta", **BITS | {"bitmap": False}, n=4, m=8),
    case("w16_bitmap", 1, 34, 104, "values", **BITS | {"bitmap": False}, n=1, m=4, **GATE),
], {"K": 96})  # fmt: skip
MISSES += [
    ("w16_bitmap", BITS, {"bitmap": False}, "bitmap"),
    ("w16_bitmap", BITS, {"x_dtype": "fp32"}, "x_dtype"),
    ("w16_bitmap", BITS, {"weights": "int"}, "weights"),
    ("w16_bitmap", BITS, {"m": 8, "n": 4}, "m"),
    ("w16_bitmap", BITS, {"bitmap": False, "m": 4, "n": 2}, "m"),
]
# Kept values are read where they are needed; the dense tile goes through shared memory once.
FACTS += [
    ("w16_bitmap", BITS, TileConfig(8, 64, 3), "sm_80", 11.5, 8),
    ("w16_bitmap", BITS | {"x_dtype": "bf16"}, TileConfig(16, 64, 3), "sm_90", 13.0, 8),
]
TILED["w16_bitmap"] = [
    {**BITS, "x_dtype": "bf16", **ALL_SIDES}, {**BITS, "x_dtype": "fp16", "rank": 64}
]  # fmt: skip
BITS4: Fields = {"bitmap": True}
family("w4_bitmap", BITS4, [
    case("w4_bitmap", 1, 33, 96, "zero", **BITS4, group=32, asym=True),
    case("w4_bitmap", 3, 67, 300, "bitmap", **BITS4, group=64, stride="padded"),
    case("w4_bitmap", 9, 33, 260, "scale", **BITS4, x_dtype="bf16", asym=True),
    case("w4_bitmap", 2, 34, 200, "bitmap", **BITS4, group=0, **ALL_SIDES, **GATE),
    case("w4_bitmap", 3, 33, 264, "meta", group=64, n=4, m=8, asym=True),
], {"K": 96})  # fmt: skip
MISSES += [
    ("w4_bitmap", BITS4, {"bits": 3}, "bits"),
    ("w4_bitmap", BITS4, {"bitmap": False}, "bitmap"),
    ("w4_bitmap", BITS4, {"group": 16}, "group"),
]
FACTS += [
    ("w4_bitmap", BITS4, TileConfig(8, 64, 3), "sm_90", 24.0, 64),
]
TILED["w4_bitmap"] = [
    {**BITS4, "group": 32, "asym": True, "x_dtype": "bf16", **ALL_SIDES}, BITS4
]  # fmt: skip

# ** dense weights, as they were captured **
D16: Fields = {"weights": "dense", "scale_dtype": "", "bits": 16, "group": 0}
family("w16", D16, [
    case("w16", 1, 33, 96, "values", **D16),
    case("w16", 3, 35, 296, "values", **D16, stride="padded"),
    case("w16", 9, 33, 264, "values", **D16, x_dtype="bf16"),
    case("w16", 2, 1, 136, "values", **D16, x_dtype="fp32", stride="halves"),
    case("w16", 2, 70, 200, "values", **D16, **ALL_SIDES, **GATE, smooth=True),
], {"K": 72})  # fmt: skip
MISSES += [
    ("w16", D16, {"bits": 8}, "bits"),
    ("w16", D16, {"K": 260}, "K"),
    ("w16", D16, {"m": 4, "n": 2}, "m"),
    ("w16", D16, {"bitmap": True}, "bitmap"),
    ("w16", D16, {"weights": "int"}, "weights"),
    ("w16", D16, {"rounds": "int8 tensor"}, "rounds"),
]
# Nothing is decoded: what issues is copies, products, and the norm of x.
FACTS += [
    ("w16", D16, TileConfig(16, 64), "sm_90", 1.7, 0),
    ("w16", D16 | {"x_dtype": "bf16"}, TileConfig(8, 64), "sm_90", 1.4, 0),
    ("w16", D16, TileConfig(32, 128), "sm_80", 1.5, 0),
]
TILED["w16"] = [
    {**D16, "x_dtype": "bf16", **ALL_SIDES}, {**D16, "x_dtype": "fp32", **ALL_SIDES},
    {**D16, "x_dtype": "fp16", "rank": 64}, {**D16, "x_dtype": "fp32", "rank": 64}, D16,
]  # fmt: skip

PAIRED: Fields = {"weights": "paired"}
family("w4_pairs", PAIRED, [
    case("w4_pairs", 1, 33, 96, **PAIRED, group=32),
    case("w4_pairs", 2, 34, 520, "scale", **PAIRED, group=256, **ALL_SIDES, **GATE),
    case("w4_pairs", 2, 33, 130, **PAIRED, group=0, x_dtype="fp32", rounds="pairs4 token"),
], {"K": 96, "group": 32})  # fmt: skip
MISSES += [
    ("w4_pairs", PAIRED, change, next(iter(change)))
    for change in ({"bits": 8}, {"K": 131}, {"group": 48}, {"asym": True}, {"scale_dtype": ""})
]
FACTS.append(("w4_pairs", PAIRED, TileConfig(8, 64), "sm_90", 9.7, 0))
TILED["w4_pairs"] = grid(PAIRED, zeros=False)
