"""How an attention's keys and values are kept between calls: a record per attention, and tensors.

An uncached program names the attention node, a cached one the state. The state does what the record
says; the graph is the same but for keys that are kept before their rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .errors import ModelError, VerifierError
from .literals import check_text
from .packing import packed_words

if TYPE_CHECKING:
    from .graph import Param, Program

# Bits that each kind may have.
KINDS: dict[str, tuple[int, ...]] = {
    "int8": (8,), "fp8": (8,), "kivi": (2, 4, 8), "kvquant": (2, 3, 4),
    "latent": (16,),
}  # fmt: skip
PLAIN = "kv"
# Largest residual window and number of first tokens; far above what pays.
MAX_TOKENS = 1 << 13
MAX_CACHES = 1 << 14
MAX_RANK = 1 << 20


@dataclass(frozen=True)
class CacheScheme:
    """What becomes of one attention's keys and values.

    Attributes:
        kind: ``int8`` and ``fp8`` (e4m3): symmetric, a scale per token and head, for keys a stored
            one per channel where ``keys`` says so. ``kivi`` (arXiv 2402.02750): keys asymmetric per
            channel over ``group`` tokens, values asymmetric per token over ``group`` channels.
            ``kvquant`` (arXiv 2401.18079): levels of a table, keys in stored ranges per channel,
            values in each token's own range. ``latent``: keys as the narrower value that the last
            matrix before them reads, which multiplies it when they are read; values as they come.
        bits: of each code; of ``latent`` those of a number.
        group: of ``kivi``, else None.
        residual: R of ``kivi``: newest values that stay as they are; keys stay until R are full.
        first: tokens at positions 0..first-1 that stay as they are (``kvquant``).
        outliers: share of each value vector, half at each end, that is kept apart and exact; keys
            outside of their stored ranges are (``kvquant``).
        keys: what has a scale of its own, ``token`` or ``channel``.
        turned: keys are kept before their rotation, and rotated when they are read.
        rank: channels of a ``latent``, for all heads together.
        slot: number of this record's tensors, ``cache.<slot>.<part>``.
    """

    kind: str
    bits: int
    group: int | None = None
    residual: int = 0
    first: int = 0
    outliers: float = 0.0
    keys: str = "channel"
    turned: bool = False
    slot: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelError(f"expected a cache of {sorted(KINDS)}, found {self.kind!r}")
        if self.bits not in KINDS[self.kind]:
            raise ModelError(f"expected {KINDS[self.kind]} bits of {self.kind}, found {self.bits}")
        if self.keys not in ("token", "channel"):
            raise ModelError(f"expected keys per token or channel, found {self.keys!r}")
        whole = (self.residual, self.first)
        if not all(0 <= n <= MAX_TOKENS for n in whole) or not 0 <= self.slot < MAX_CACHES:
            raise ModelError(f"expected counts in range, found {(*whole, self.slot)}")
        if not (math.isfinite(self.outliers) and 0 <= self.outliers <= 0.5):
            raise ModelError(f"expected a share of outliers in 0..0.5, found {self.outliers}")
        table, latent = self.kind == "kvquant", self.kind == "latent"
        if not table and (self.first or self.outliers or (self.turned and not latent)):
            raise ModelError(f"expected first, outliers and turned of kvquant, found {self.kind}")
        if not (1 <= self.rank <= MAX_RANK if latent else self.rank == 0):
            raise ModelError(f"expected a rank of latents alone, found {self.rank} of {self.kind}")
        if self.kind in ("kivi", "kvquant") and self.keys != "channel":
            raise ModelError(f"expected keys per channel of {self.kind}, found {self.keys}")
        self._check_windows()

    def _check_windows(self) -> None:
        if self.kind != "kivi":
            if self.group is not None or self.residual:
                raise ModelError(f"expected group and residual of kivi, found {self.kind}")
            return
        if self.group is None or not 1 <= self.group <= MAX_TOKENS:
            raise ModelError(f"expected a group of 1 or more, found {self.group}")
        if not self.residual or self.residual % self.group:
            raise ModelError(
                f"expected a residual window of whole groups of {self.group} tokens, "
                f"found {self.residual}"
            )

    def value_group(self, channels: int) -> int:
        """Channels of a value that share a scale: ``group``, or all where there are fewer.

        Raises:
            ModelError: the group does not divide the channels; names the nearest that does.
        """
        group = min(self.group or channels, channels)
        if channels % group:
            near = max(d for d in range(1, group + 1) if channels % d == 0)
            raise ModelError(
                f"expected a group that divides {channels} channels of a value, found {group}",
                hint=f"group={near}",
            )
        return group

    def tensors(self, heads: int, k: int, v: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the f32 tensors that belong to the record, by name.

        Args:
            heads: key heads; k, v: channels of a key and of a value.
        """
        base, levels = f"cache.{self.slot}", (2, 1 << self.bits)
        if self.kind == "kvquant":
            return {
                f"{base}.key_range": (2, heads, k), f"{base}.key_levels": levels,
                f"{base}.value_levels": levels,
            }  # fmt: skip
        stored = self.kind in ("int8", "fp8") and self.keys == "channel"
        return {f"{base}.key_scale": (heads, k)} if stored else {}

    def token_bits(self, heads: int, k: int, v: int) -> float:
        """Bits that one more token takes in the long run, outliers of keys as many as of values."""
        if self.kind == "latent":
            return self.bits * (self.rank + heads * v)
        if self.kind in ("int8", "fp8"):
            return heads * (8 * (k + v) + 16 * (1 + (self.keys == "token")))
        words = 32 * heads * (packed_words(k, self.bits) + packed_words(v, self.bits))
        if self.kind == "kivi":
            assert self.group is not None
            return words + 32 * heads * (k / self.group + v / self.value_group(v))
        apart = outlier_count(self.outliers, heads * v) * 2
        return words + 32 + 2 * apart * 96

    def to_json(self) -> dict[str, Any]:
        """JSON values that :func:`from_json` reads."""
        return {
            "kind": self.kind, "bits": self.bits, "group": self.group, "residual": self.residual,
            "first": self.first, "outliers": float(self.outliers).hex(), "keys": self.keys,
            "turned": self.turned, "slot": self.slot,
            **({"rank": self.rank} if self.rank else {}),
        }  # fmt: skip


_FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,), "bits": (int,), "group": (int, type(None)), "residual": (int,),
    "first": (int,), "outliers": (str,), "keys": (str,), "turned": (bool,), "slot": (int,),
}  # fmt: skip
_MORE: dict[str, tuple[type, ...]] = {"rank": (int,)}


def outlier_count(share: float, width: int) -> int:
    """Numbers kept apart at each end of a vector: half the share, at least one where there is any.

    Raises nothing: a vector of fewer than four numbers keeps none apart.
    """
    return max(1, round(share * width / 2)) if share and width >= 4 else 0


def from_json(data: Any) -> CacheScheme:
    """The record of :meth:`CacheScheme.to_json`.

    Raises:
        ModelError: anything else; the field is named.
    """
    if not isinstance(data, dict) or set(data) - set(_MORE) != set(_FIELDS):
        raise ModelError(f"expected a cache with fields {sorted(_FIELDS)}, found others")
    known = {n: k for n, k in (_FIELDS | _MORE).items() if n in data}
    for name, kinds in known.items():
        if type(data[name]) not in kinds:
            raise ModelError(f"expected {kinds[0].__name__}, found {data[name]!r}", where=name)
    text = check_text(data["outliers"], "a number", limit=40)
    try:
        share = float.fromhex(text)
    except (ValueError, OverflowError):
        raise ModelError(f"expected a number in hex, found {text!r}", where="outliers") from None
    if share.hex() != text:
        raise ModelError(f"expected {share.hex()!r}, found {text!r}", where="outliers")
    return CacheScheme(**{**data, "outliers": share})


def all_from_json(data: Any) -> dict[str, CacheScheme]:
    """Records by the node or state that they are about.

    Raises:
        ModelError: not such records.
    """
    if not isinstance(data, dict) or not 0 < len(data) <= MAX_CACHES:
        raise ModelError("expected caches by name, found none or too many")
    out: dict[str, CacheScheme] = {}
    for name, value in data.items():
        try:
            out[check_text(name, "a name")] = from_json(value)
        except ModelError as e:
            raise ModelError(e.message, where=f"{name[:80]}.{e.where}") from None
    return out


def sizes_of(node: fx.Node) -> tuple[int, int, int]:
    """(key heads, channels of a key, channels of a value) of an attention.

    Raises:
        ModelError: they are not fixed.
    """
    from .graph import tensor_type

    # A cached key may be a latent; what the query multiplies says how wide a key is.
    q, v = (tensor_type(n) for n in (node.args[0], node.args[2]) if isinstance(n, fx.Node))
    found = (v.shape[1], q.shape[3], v.shape[3])
    if not all(isinstance(n, int) for n in found):
        raise ModelError(f"expected fixed heads and channels, found {found}", where=node.name)
    return int(found[0]), int(found[1]), int(found[2])


def owners(program: Program) -> dict[str, fx.Node]:
    """The attention node that each record is about.

    Raises:
        ModelError: a record about nothing.
    """
    states = {str(n.kwargs["state"]): n for n in program.calls("llmc.cached_attention")}
    plain = {} if states else {n.name: n for n in program.calls("llmc.attention")}
    known = states or plain
    for name in program.caches:
        if name not in known:
            raise ModelError(f"expected an attention named {name!r}, found none", where="caches")
    return {name: known[name] for name in program.caches}


def check_caches(program: Program) -> None:
    """Raises ModelError unless each record fits its attention, and no two share tensors."""
    seen: dict[str, str] = {}
    for name, node in owners(program).items():
        scheme = program.caches[name]
        heads, k, v = sizes_of(node)
        scheme.value_group(v)
        for tensor in scheme.tensors(heads, k, v):
            other = seen.setdefault(tensor, name)
            if other != name:
                raise ModelError(f"expected tensors of its own, found {tensor} of {other!r} too",
                                 where=name)  # fmt: skip
        state = program.states.get(name)
        if state is not None and state.kind != scheme.kind:
            raise ModelError(f"expected state of kind {scheme.kind!r}", where=name)
    for name, state in program.states.items():
        if state.kind != PLAIN and name not in program.caches:
            raise ModelError(f"expected a record of state {name!r}, found none", where="caches")


def cache_params(program: Program) -> dict[str, Param]:
    """What is stored for caches beside the graph's parameters, by name."""
    from .graph import Param

    out: dict[str, Param] = {}
    for name, node in owners(program).items():
        for tensor, shape in program.caches[name].tensors(*sizes_of(node)).items():
            out[tensor] = Param(tensor, shape, torch.float32, keep=True)
    return out


def set_caches(
    program: Program, caches: Mapping[str, CacheScheme], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Declare how caches are kept, in place; ``tensors`` by name, none in a prediction.

    Raises:
        ModelError: a record that does not fit, or a tensor of another shape.
    """
    from .graph import DictWeights

    program.caches = dict(caches)
    check_caches(program)
    if not tensors:
        return
    if not isinstance(program.weights, DictWeights):
        program.weights = DictWeights({}, program.weights)
    program.weights.tensors.update(tensors)
    load_all(program)


def load_all(program: Program) -> dict[str, dict[str, Tensor]]:
    """Tensors of each record by part, checked.

    Raises:
        ModelError: missing, of another shape or dtype, not finite, or not what its kind wants.
    """
    out: dict[str, dict[str, Tensor]] = {}
    for name, node in owners(program).items():
        out[name] = {}
        for tensor, shape in program.caches[name].tensors(*sizes_of(node)).items():
            found, part = program.weights.load(tensor), tensor.rpartition(".")[2]
            _check_tensor(tensor, part, found, shape)
            out[name][part] = found
    return out


def _check_tensor(name: str, part: str, found: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != shape or found.dtype != torch.float32:
        raise ModelError(
            f"expected tensor {name} f32{list(shape)}, found {found.dtype}{list(found.shape)}"
        )
    if not bool(torch.isfinite(found).all()):
        raise ModelError(f"expected finite numbers in tensor {name}, found NaN or inf")
    if part == "key_scale" and not bool((found > 0).all()):
        raise ModelError(f"expected scales above 0 in tensor {name}, found others")
    if part == "key_range" and not bool((found[1] > found[0]).all()):
        raise ModelError(f"expected ranges that are not empty in tensor {name}, found others")
    if part.endswith("levels") and not bool((found.diff(dim=1) >= 0).all()):
        raise ModelError(f"expected ascending levels in tensor {name}, found others")


def caches_law(program: Program) -> None:
    """Each cache record fits the attention that it names.

    Raises:
        VerifierError: rule ``caches``.
    """
    try:
        check_caches(program)
    except ModelError as e:
        raise VerifierError("caches", e.message, node=e.where or None) from None
