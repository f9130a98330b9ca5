"""kv8, kvfp8, kivi, kvquant: keep keys and values in few bits while decoding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..compiler.analysis.rotation import CacheSite, Rotation
from ..compiler.ir.caches import CacheScheme, outlier_count
from ..compiler.ir.errors import UsageError
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.caches import (
    CachePass,
    fisher,
    kept_attention,
    look,
    scales,
    table,
    watched,
)
from ..compiler.pipeline.structure import Context


@dataclass(frozen=True)
class EightBits(CachePass):
    """Keys and values are kept as int8 or e4m3 codes: x̂ = s q, a scale per token and head.

    With keys=channel a key's scale is its channel's, from calibration, and only values have scales
    of their own. A call attends its own tokens as they came and older ones as codes say.
    """

    variants = {"kv8": {"codes": "int8"}, "kvfp8": {"codes": "fp8"}}
    stage = "kv"
    effect = Lossy("perplexity, token by token")
    source = "KVQuant, arXiv 2401.18079 §3.1 (keys per channel, values per token)"
    pattern = kept_attention
    hits = (Example("llama_gqa"), Example("with_rope"))
    misses = (Example("sees_all", "causal"),)

    codes: str = knob("int8", "grid of the codes", choices=("int8", "fp8"))
    keys: str = knob("token", "what has a scale of its own", choices=("token", "channel"))

    def calibrated(self) -> bool:
        return self.keys == "channel"

    def scheme(self, site: CacheSite) -> CacheScheme:
        return CacheScheme(self.codes, 8, keys=self.keys, slot=site.slot)

    def fit(self, context: Context, sites: list[CacheSite]) -> dict[str, dict[str, Tensor]]:
        top = 127.0 if self.codes == "int8" else 448.0
        seen = look(context.program, sites, context.data, context.options, turned=False,
                    listener=context.listener)  # fmt: skip
        return {one.site.node: {"key_scale": scales(one.keys, top)} for one in seen}


@dataclass(frozen=True)
class Kivi(CachePass):
    """x̂ = q s + m: keys per channel over ``group`` tokens, values per token over as many channels.

    The newest numbers stay as they are: keys until ``residual`` are full, which then all become
    codes, values until they are older than ``residual`` tokens. A prompt attends itself in full
    precision. No calibration.
    """

    variants = {"kivi": {}}
    stage = "kv"
    effect = Lossy("perplexity, token by token")
    source = "KIVI, arXiv 2402.02750"
    pattern = kept_attention
    hits = (Example("llama_gqa"), Example("with_rope"))
    misses = (Example("sees_all", "causal"),)

    bits: int = knob(4, "bits of each code: 2, 4 or 8", lo=2, hi=8)
    group: int = knob(32, "tokens of a key's group, channels of a value's", lo=1, hi=4096)
    residual: int = knob(128, "newest tokens that stay as they are", lo=1, hi=1 << 13)

    def check(self) -> None:
        if self.bits not in (2, 4, 8):
            raise UsageError(f"kivi:bits: expected 2, 4 or 8, found {self.bits}")
        if self.residual % self.group:
            near = max(1, round(self.residual / self.group)) * self.group
            raise UsageError(
                f"kivi:residual: expected whole groups of {self.group} tokens, "
                f"found {self.residual}", hint=f"residual={near}",
            )  # fmt: skip

    def scheme(self, site: CacheSite) -> CacheScheme:
        group, residual = self.group, self.residual
        return CacheScheme("kivi", self.bits, group, residual, slot=site.slot)


def _rotation_moves(made: KVQuant, site: CacheSite) -> str | None:
    return site.turn if isinstance(site.turn, str) else None


@dataclass(frozen=True)
class KVQuant(CachePass):
    """Codes are levels of a table per layer: keys before their rotation, each channel in its range
    from calibration, values in each token's own; what is far outside is kept apart, and exact.

    The table is the weighted k-means of the numbers in -1..1, weighted by the loss's squared
    gradients (fisher) or alike (plain). The first tokens stay as they are. norm gives the levels
    that are read the mean and deviation of what was seen (Q-Norm).
    """

    variants = {"kvquant": {}}
    stage = "kv"
    effect = Lossy("perplexity, token by token")
    source = "KVQuant, arXiv 2401.18079"
    pattern = kept_attention
    preconditions = (Precondition("keys_before_rotation", _rotation_moves),)
    hits = (Example("llama_gqa"), Example("with_rope"))
    misses = (Example("scaled_after_rope", "keys_before_rotation"),)

    bits: int = knob(3, "bits of each code", lo=2, hi=4)
    outliers: float = knob(0.01, "share of the numbers that are kept apart", lo=0.0, hi=0.2)
    first: int = knob(1, "first tokens that stay as they are", lo=0, hi=4096)
    weigh: str = knob("fisher", "what counts in a table", choices=("fisher", "plain"))
    norm: bool = knob(False, "give the levels that are read the numbers' mean and deviation")

    def calibrated(self) -> bool:
        return True

    def forwards(self, sites: list[CacheSite]) -> float:
        return 1.0 if self.weigh == "plain" else 4.0

    def scheme(self, site: CacheSite) -> CacheScheme:
        return CacheScheme(
            "kvquant", self.bits, first=self.first, outliers=self.outliers,
            turned=isinstance(site.turn, Rotation), slot=site.slot,
        )  # fmt: skip

    def fit(self, context: Context, sites: list[CacheSite]) -> dict[str, dict[str, Tensor]]:
        given = (context.program, sites, context.data, context.options)
        told = context.listener
        weights = {} if self.weigh == "plain" else fisher(*given, turned=True, listener=told)
        out: dict[str, dict[str, Tensor]] = {}
        for one in look(*given, turned=True, listener=told):
            names = watched(context.program, one.site, True)
            count = outlier_count(self.outliers, one.site.heads * one.site.v)
            out[one.site.node] = table(
                one, weights, names, self.bits, self.outliers, count, norm=self.norm
            )
        return out
