"""The scheme: the declarative record of what becomes of one weight view.

    Ŵ = T_out⁻¹ (A·B + S + M ⊙ deq(codes)) T_in⁻¹      b̂ = b + δ      x ← grid_x(T_in x)

All fields exist; ``unbuilt`` names those that no solver or lowering realises yet, and those refuse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import ModelError, UsageError
from .levels import WIDTHS


@dataclass(frozen=True)
class View:
    """Which part of which parameter: rows of a matrix, or one expert of a stacked tensor."""

    param: str
    rows: tuple[int, int] | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Codes:
    """M ⊙ deq(codes): codes on a grid.

    ``group`` counts dense input columns that share a scale; None is one scale per row. ``grid`` is
    ``uniform``, fixed levels by name (see :mod:`.levels`), ``quantile`` (scaled levels, one table
    per matrix), ``lut`` or ``shared`` (levels that are weights, a table per row or per matrix), or
    ``signs`` (a sum of signed factors), or ``pairs`` (an outlier takes its neighbour's code, see
    :mod:`.ops.pairs`). ``double``: scales are 8-bit codes themselves; ``power``:
    scales are powers of two. ``bilevel``: bits of scales that 16 rows give one range.
    """

    bits: int
    group: int | None
    symmetric: bool = True
    grid: str = "uniform"
    scale_dtype: str = "f16"
    double: bool = False
    power: bool = False
    bilevel: int = 0

    @property
    def scaled(self) -> bool:
        """Whether there are scales; else levels or factors are weights themselves."""
        return self.grid not in ("lut", "shared", "signs")

    @property
    def tables(self) -> str | None:
        """Whether levels are stored, per ``row`` or per ``matrix``."""
        return {"lut": "row", "shared": "matrix", "quantile": "matrix"}.get(self.grid)

    @property
    def has_zero(self) -> bool:
        """Whether 0 has a code, or is a level of the table where zeros are scattered."""
        return self.grid not in ("binary", "midrise", "signs")

    @property
    def short(self) -> str:
        """A few characters for tables, e.g. ``nf4 g64``."""
        name = {"uniform": f"w{self.bits}", "ternary": "ternary", "binary": "binary"}
        floats = self.grid in ("e2m1", "e4m3", "e5m2")
        text = name.get(self.grid, self.grid if floats else f"{self.grid}{self.bits}")
        if self.scaled or self.grid == "signs":
            text += " row" if self.group is None else f" g{self.group}"
        text += "" if self.symmetric else " asym"
        return (
            text + " double" * self.double + " power" * self.power + " bilevel" * bool(self.bilevel)
        )

    def require_built(self) -> None:
        """Refuse what no solver realises.

        Raises:
            UsageError: naming the grid and the bits that it can have.
        """
        known = GRID_BITS.get(self.grid)
        if known is None:
            grids = ", ".join(GRID_BITS)
            raise UsageError(f"expected a grid of {grids}, found {self.grid!r}; not built yet")
        if self.bits not in known:
            raise UsageError(
                f"{self.grid}:bits: expected {' or '.join(map(str, known))}, found {self.bits}"
            )
        if self.bilevel and (self.grid != "uniform" or self.double or self.power):
            raise UsageError(f"expected bilevel scales on a uniform grid, found {self.short}")


GRID_BITS: dict[str, tuple[int, ...]] = {
    "uniform": tuple(range(2, 9)),
    **WIDTHS,
    "quantile": tuple(range(2, 9)),
    "lut": tuple(range(1, 9)),
    "shared": tuple(range(1, 9)),
    "signs": tuple(range(1, 6)),
    "pairs": (4, 8),
}
"""Bits that the codes of each grid can have."""


@dataclass(frozen=True)
class Mask:
    """M: n kept of m consecutive inputs, or a share ``sparsity`` of zeros anywhere (n = m = 0).

    ``by_loss``: the share follows from the whole model's loss and differs from weight to weight.
    """

    n: int = 0
    m: int = 0
    sparsity: float = 0.0
    by_loss: bool = False

    @property
    def structured(self) -> bool:
        return self.m > 0

    @property
    def short(self) -> str:
        if self.structured:
            return f"{self.n}:{self.m}"
        return "sparse by loss" if self.by_loss else f"{self.sparsity:.0%} sparse"


@dataclass(frozen=True)
class Transform:
    """T: diagonal, permutation or orthogonal; folded into neighbours or applied online.

    An orthogonal one is applied by ``llmc.rotate`` (see :mod:`.ops.rotation`), behind a positive
    scale per channel where ``scaled``.
    """

    kind: str
    folded: bool
    tensor: str = ""
    scaled: bool = False

    @property
    def online(self) -> bool:
        return self.kind == "orthogonal" and not self.folded and not self.tensor


@dataclass(frozen=True)
class LowRank:
    """A·B of that rank, factors in 16 bits or in codes of 8; they may be shared by id."""

    rank: int
    shared: str = ""
    bits: int = 16


@dataclass(frozen=True)
class Sparse:
    """S: sparse entries, or whole outlier columns, kept in high precision.

    Kind ``csr``: of the best ``share`` of each row's weights those that an N:M mask drops.
    Kind ``outliers``: that share of the matrix, kept beside codes.
    Kind ``columns``: inputs that reach ``threshold`` in calibration, at most that share of them.
    Beside a mask both are outside of it: its n of m, or its share of zeros, count other weights.
    """

    kind: str
    share: float
    threshold: float = 0.0


@dataclass(frozen=True)
class InputGrid:
    """grid_x: how the input is rounded, by ``llmc.round_input`` (see :mod:`.ops.rounding`).

    ``per``: one scale per ``token`` or per ``tensor`` as it comes, or ``static`` from calibration.
    ``kind``: ``int``, a small float by name, or ``pairs``. ``group``: channels that share a scale.
    ``power``: scales are powers of two. ``clip``: where a static grid ends, at the largest value
    (absmax), where it keeps ``percentile`` of the values, or where it costs least (mse).
    """

    bits: int
    per: str = "token"
    kind: str = "int"
    group: int | None = None
    power: bool = False
    clip: str = "absmax"
    percentile: float = 0.0

    @property
    def static(self) -> bool:
        return self.per == "static"

    @property
    def short(self) -> str:
        """A few characters for tables, e.g. ``a8 token``."""
        name = {"int": f"a{self.bits}", "pairs": f"a{self.bits} pairs"}.get(self.kind)
        text = f"{name or 'a-' + self.kind} {self.per}"
        text += {"mse": " mse", "percentile": f" p{self.percentile:g}"}.get(self.clip, "")
        return text + (f" g{self.group}" if self.group else "") + " power" * self.power


@dataclass(frozen=True)
class Scheme:
    """What becomes of one weight view. None means "not used"."""

    view: View
    codes: Codes | None = None
    mask: Mask | None = None
    t_in: Transform | None = None
    t_out: Transform | None = None
    low_rank: LowRank | None = None
    sparse: Sparse | None = None
    bias_delta: bool = False
    input_grid: InputGrid | None = None

    def merge(self, **parts: Any) -> Scheme:
        """Add fields that further passes state.

        Raises:
            UsageError: a field is stated twice with different values.
        """
        for key, value in parts.items():
            old = getattr(self, key)
            kinds = {getattr(t, "kind", "") for t in (old, value)}
            if kinds == {"diagonal", "orthogonal"}:
                raise UsageError(
                    f"expected channel scales or a rotation on the edges of {self.view.param}, "
                    "found both: a rotation behind scales that were measured before it undoes them",
                    hint="leave the scales out: quip rescales the inputs itself before it rotates",
                )
            if old not in (None, False) and old != value:
                raise UsageError(f"expected one {key} per weight, found {old} and {value}")
        return replace(self, **parts)

    def require_built(self) -> None:
        """Refuse what no solver and lowering realises.

        Raises:
            UsageError: naming the field.
        """
        s = self.sparse
        masked = self.mask is not None and self.mask.structured
        kinds = ("outliers", "columns")
        if s is not None and not (s.kind == "csr" and masked) and s.kind not in kinds:
            raise UsageError(
                f"expected sparse entries beside an N:M mask, found {s}; not built yet"
            )
        if s is not None and s.kind == "outliers" and self.codes is None:
            raise UsageError(f"expected codes that outliers stand beside, found {self.short}")
        if masked and self.codes is not None and self.codes.grid == "pairs":
            raise UsageError(
                f"expected pairs of neighbours, found an N:M mask that parts them ({self.short})",
                hint="prune:sparsity=0.5 leaves codes where they are",
            )
        free = self.mask is not None and not self.mask.structured
        if free and self.codes is not None and not self.codes.has_zero:
            raise UsageError(
                f"expected a grid that holds 0 beside unstructured zeros, found {self.short}",
                hint="an n:m mask stores no code for a zero",
            )
        if s is not None and s.kind == "columns" and self.input_grid is None:
            raise UsageError(f"expected an input grid beside outlier columns, found {self.short}")
        if self.low_rank is not None and self.codes is None and self.mask is None:
            raise UsageError("expected codes or zeros beside low_rank, found none: nothing is lost")
        if self.low_rank is not None and self.low_rank.shared:
            raise UsageError("expected low_rank of one weight, found shared factors; not built yet")
        if self.low_rank is not None and self.low_rank.bits not in (8, 16):
            raise UsageError(f"expected factors of 8 or 16 bits, found {self.low_rank.bits}")
        if self.bias_delta:
            raise UsageError("expected a scheme without bias_delta; it is not built yet")
        for t in (self.t_in, self.t_out):
            if t is not None and not (t.folded and t.kind == "diagonal") and not t.online:
                raise UsageError(f"expected a folded diagonal transform, found {t}; not built yet")
        self._require_alone()
        if self.view.rows is not None or self.view.expert is not None:
            raise UsageError("expected a whole matrix, found a slice or an expert; not built yet")
        if self.codes is not None:
            self.codes.require_built()

    @property
    def rotated(self) -> str:
        """Which sides are rotated online: ``in``, ``out``, ``both`` or nothing."""
        sides = [s for s, t in (("in", self.t_in), ("out", self.t_out)) if t and t.online]
        return "both" if len(sides) == 2 else "".join(sides)

    def _require_alone(self) -> None:
        """Refuse what a rotation cannot stand beside.

        Raises:
            UsageError: naming it.
        """
        reasons = {
            "mask": "zeros of the matrix are no zeros of the rotated one",
            "sparse": "weights that stay off the grid are spread over the whole matrix",
            "low_rank": "what it gives back is not rotated; not built yet",
            "input_grid": "its scales would be those of the inputs before the rotation; "
            "not built yet",
            "codes": "nothing is rounded",
        }
        if not self.rotated:
            return
        beside = [k for k in reasons if (getattr(self, k) is None) == (k == "codes")]
        if beside:
            what = "no codes" if beside[0] == "codes" else beside[0]
            raise UsageError(
                f"expected codes alone beside an online rotation, found {what} ({self.short}): "
                f"{reasons[beside[0]]}",
                hint="rotate, which is folded into the weights, goes with everything behind it",
            )

    @property
    def short(self) -> str:
        """A few characters for tables, e.g. ``2:4 w4 g128``."""
        parts = []
        if self.rotated:
            parts.append(f"rotated {self.rotated}")
        elif self.t_in is not None or self.t_out is not None:
            parts.append("scaled")
        if self.mask is not None:
            parts.append(self.mask.short)
        if self.sparse is not None:
            share = self.sparse.share
            text = {"csr": f"+top{share:.0%}", "columns": f"+columns {self.sparse.threshold:g}"}
            parts.append(text.get(self.sparse.kind, f"+{100 * share:.3g}%"))
        if self.codes is not None:
            parts.append(self.codes.short)
        if self.low_rank is not None:
            rank = self.low_rank
            parts.append(f"+rank {rank.rank}" + (f" of {rank.bits} bits" if rank.bits < 16 else ""))
        if self.input_grid is not None:
            parts.append(self.input_grid.short)
        return " ".join(parts) or "dense"

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v not in (None, False)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scheme:
        """Inverse of ``to_json``.

        Raises:
            ModelError: an unknown field or a missing one.
        """
        parts = {
            "view": View, "codes": Codes, "mask": Mask, "t_in": Transform, "t_out": Transform,
            "low_rank": LowRank, "sparse": Sparse, "input_grid": InputGrid,
        }  # fmt: skip
        known = {f.name for f in fields(cls)}
        out: dict[str, Any] = {}
        for key, value in data.items():
            if key not in known:
                raise ModelError(f"expected a scheme field of {sorted(known)}, found {key!r}")
            try:
                if isinstance(value, dict) and isinstance(value.get("rows"), list):
                    value = {**value, "rows": tuple(value["rows"])}
                out[key] = parts[key](**value) if key in parts else value
            except TypeError as e:
                raise ModelError(f"expected the fields of {key}, found {value} ({e})") from None
        if "view" not in out:
            raise ModelError("expected a scheme with a view, found none")
        return cls(**out)
