"""The scheme: the declarative record of what becomes of one weight view.

    Ŵ = T_out⁻¹ (A·B + S + M ⊙ deq(codes)) T_in⁻¹      b̂ = b + δ      x ← grid_x(T_in x)

All fields exist; ``unbuilt`` names those that no solver or lowering realises yet, and those refuse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import ModelError, UsageError


@dataclass(frozen=True)
class View:
    """Which part of which parameter: rows of a matrix, or one expert of a stacked tensor."""

    param: str
    rows: tuple[int, int] | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Codes:
    """M ⊙ deq(codes): integer codes on a grid.

    ``group`` counts dense input columns that share a scale; None is one scale per row.
    """

    bits: int
    group: int | None
    symmetric: bool = True
    grid: str = "uniform"
    scale_dtype: str = "f16"


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
    """T: diagonal, permutation or orthogonal; folded into neighbours or applied online."""

    kind: str
    folded: bool
    tensor: str = ""


@dataclass(frozen=True)
class LowRank:
    """A·B of that rank; factors may be shared by id."""

    rank: int
    shared: str = ""


@dataclass(frozen=True)
class Sparse:
    """S: sparse entries, or whole outlier columns, kept in high precision.

    Kind ``csr``: of the best ``share`` of each row's weights those that an N:M mask drops.
    """

    kind: str
    share: float


@dataclass(frozen=True)
class InputGrid:
    """grid_x: how the input is quantised."""

    bits: int
    granularity: str
    static: bool = False
    kind: str = "int"


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
            if old not in (None, False) and old != value:
                raise UsageError(f"expected one {key} per weight, found {old} and {value}")
        return replace(self, **parts)

    def require_built(self) -> None:
        """Refuse what no solver and lowering realises.

        Raises:
            UsageError: naming the field.
        """
        if self.sparse is not None and not (
            self.sparse.kind == "csr" and self.mask is not None and self.mask.structured
        ):
            raise UsageError(
                f"expected sparse entries beside an N:M mask, found {self.sparse}; not built yet"
            )
        for name in ("low_rank", "input_grid"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"expected a scheme of codes and masks, found {name}; not built yet"
                )
        if self.bias_delta:
            raise UsageError("expected a scheme without bias_delta; it is not built yet")
        for t in (self.t_in, self.t_out):
            if t is not None and not (t.folded and t.kind == "diagonal"):
                raise UsageError(f"expected a folded diagonal transform, found {t}; not built yet")
        if self.view.rows is not None or self.view.expert is not None:
            raise UsageError("expected a whole matrix, found a slice or an expert; not built yet")
        if self.codes is not None and self.codes.grid != "uniform":
            raise UsageError(f"expected grid 'uniform', found {self.codes.grid!r}; not built yet")

    @property
    def short(self) -> str:
        """A few characters for tables, e.g. ``2:4 w4 g128``."""
        parts = []
        if self.t_in is not None or self.t_out is not None:
            parts.append("scaled")
        if self.mask is not None:
            parts.append(self.mask.short)
        if self.sparse is not None:
            parts.append(f"+top{self.sparse.share:.0%}")
        if self.codes is not None:
            c = self.codes
            parts.append(f"w{c.bits} " + ("row" if c.group is None else f"g{c.group}"))
            if not c.symmetric:
                parts.append("asym")
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
