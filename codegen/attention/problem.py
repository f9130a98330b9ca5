"""What a kernel of cached attention must compute: all static facts of one layer's step."""

from __future__ import annotations

from dataclasses import dataclass, fields

# Queries of one step that a decode kernel takes; more are a prompt, which torch's SDPA does better.
QUERIES = 16
# Places of `llmc.cached_attention`'s optional tensors.
BIAS, SINKS, COS, UP, GAIN, SLOPES, K_LAST, Q_SCALE = 5, 6, 7, 9, 11, 13, 14, 15


@dataclass(frozen=True)
class AttentionProblem:
    """One ``llmc.cached_attention``, of q [B, H, S, D] and a cache of [B, KV, T, D] and [.., E].

    Attributes:
        heads, kv_heads: H and KV, this layer's own. D, E: channels of a key and of a value.
        queries: S, the most that a call brings.
        x_dtype: "fp16", "bf16" or "fp32", of q, new keys and values, and what is no code.
        cache: how tokens are kept, by the kinds of ``CacheScheme``; "kv" as they come.
        bits, group, residual, keys: as in ``CacheScheme``; keys "" where cache is "kv", "group"
            where a scale serves ``group`` tokens of a channel.
        causal, window, dilation, first, softcap: as in ``llmc.attention``; 0 where there is none.
        sinks, slopes, valid, bias: whether these tensors are given.
        norm: what queries and new keys are normed over first: "head", each head by itself, "row",
            all heads of a token, "behind", each head after its rotation, or "", nothing. gains: by
            a vector too, each channel times ``offset`` and its own. eps: beside the mean square.
        turn: how the channels of queries and new keys pair up that are rotated first: "half" (i and
            i + R/2), "pairs" (2i and 2i + 1) or "", not at all. rotary: R, of the first channels. A
            norm goes before, unless it is "behind".
        last: whether the last R channels are rotated instead, of which keys have one row for all
            heads, as a tensor of its own. woven: those of a pair lie side by side there, and half
            of R apart once they are rotated.
        scaled: whether queries are then multiplied by a number each.
        counted: how many tokens were kept is on the device, for launches that are recorded.
        turned, latent: keys are kept before their rotation, or as latents.
    """

    heads: int
    kv_heads: int
    D: int
    E: int
    queries: int = 1
    x_dtype: str = "fp16"
    cache: str = "kv"
    bits: int = 16
    group: int = 0
    residual: int = 0
    keys: str = ""
    causal: bool = True
    window: int = 0
    dilation: int = 1
    first: int = 0
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False
    valid: bool = False
    bias: bool = False
    norm: str = ""
    gains: bool = False
    eps: float = 0.0
    offset: float = 0.0
    turn: str = ""
    rotary: int = 0
    last: bool = False
    woven: bool = False
    scaled: bool = False
    counted: bool = False
    turned: bool = False
    latent: bool = False

    @property
    def repeat(self) -> int:
        """Query heads of one key head."""
        return self.heads // self.kv_heads

    @property
    def changed(self) -> bool:
        """Whether queries or new keys are normed, rotated or scaled first."""
        return bool(self.norm or self.turn or self.scaled)

    @property
    def value_group(self) -> int:
        """Channels of a value that share a scale; all of them where no group says otherwise."""
        return min(self.group or self.E, self.E)

    def integers(self) -> dict[str, int]:
        """The numeric fields, flags as 0 and 1, and ``wide``: 1 in fp32."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        numbers = {n: int(v) for n, v in found.items() if isinstance(v, (bool, int))}
        return {**numbers, "wide": int(self.x_dtype == "fp32")}
