"""Cases of cached attention for the tests under the interpreter, and what they must compute."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One step: sizes, cache, mask; ``T`` tokens are kept, the step's own S among them."""

    H: int
    KV: int
    D: int
    E: int
    T: int
    S: int = 1
    B: int = 1
    dtype: str = "fp32"
    cache: str = "kv"
    bits: int = 8
    group: int = 0
    residual: int = 0
    keys: str = "token"
    splits: int = 2
    window: int = 0
    dilation: int = 1
    first: int = 0
    softcap: float = 0.0
    causal: bool = True
    sinks: bool = False
    slopes: bool = False
    padded: bool = False

    @property
    def label(self) -> str:
        names = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        return "-".join(f"{n}{v}" for n, v, default in names if v != default)


KIVI = {"cache": "kivi", "group": 16, "residual": 32}
CASES = [
    # groups of query heads, sizes that are no powers of two, runs
    Case(4, 4, 16, 16, 40),
    Case(4, 1, 16, 16, 40, S=5, splits=3),
    Case(6, 2, 20, 12, 37, S=3, B=2),
    Case(8, 2, 24, 8, 33, S=16),
    Case(4, 2, 16, 16, 40, splits=1),
    Case(4, 2, 16, 16, 1),
    Case(4, 2, 16, 16, 3, S=3),
    Case(3, 3, 7, 5, 19, S=2),
    # masks
    Case(4, 2, 16, 16, 50, window=5, splits=3),
    Case(4, 2, 16, 16, 50, S=4, window=7, causal=False),
    Case(4, 2, 16, 16, 50, S=2, window=3, dilation=4),
    Case(4, 2, 16, 16, 50, S=2, window=3, dilation=2, first=2),
    Case(4, 2, 16, 16, 40, S=3, causal=False),
    Case(4, 2, 16, 16, 40, B=2, padded=True),
    Case(4, 2, 16, 16, 40, B=2, S=2, padded=True, window=6),
    Case(4, 2, 16, 16, 40, softcap=3.0),
    Case(4, 2, 16, 16, 40, S=2, sinks=True, splits=1),
    Case(4, 2, 16, 16, 40, S=2, sinks=True, softcap=3.0, window=8),
    # a bias by distance
    Case(4, 2, 16, 16, 40, S=3, slopes=True),
    Case(6, 2, 20, 12, 37, S=2, B=2, slopes=True, padded=True, window=20),
    Case(4, 1, 16, 16, 40, dtype="fp16", slopes=True, softcap=3.0, sinks=True, splits=3),
    Case(4, 2, 16, 16, 40, S=2, cache="int8", keys="channel", slopes=True, dtype="fp16"),
    Case(2, 1, 32, 32, 70, S=2, bits=4, slopes=True, **KIVI),  # type: ignore[arg-type]
    # dtypes
    Case(4, 2, 16, 16, 40, dtype="fp16"),
    Case(4, 2, 16, 16, 40, S=2, dtype="bf16", sinks=True),
    Case(8, 1, 32, 16, 70, dtype="bf16", splits=4),
    # eight bits
    *[
        Case(2, 1, 32, 16, 40, S=2, dtype=dtype, cache=cache, keys=keys)
        for cache in ("int8", "fp8")
        for keys in ("channel", "token")
        for dtype in ("fp32", "fp16", "bf16")
    ],
    Case(4, 2, 12, 20, 35, cache="int8", B=2, padded=True, window=9),
    Case(4, 1, 32, 32, 35, cache="fp8", softcap=4.0, sinks=True, keys="channel"),
    Case(4, 2, 32, 16, 1, cache="int8"),
    # KIVI: the three zones of what is code and what is not, and their borders
    *[Case(2, 1, 32, 32, T, S=2, bits=4, **KIVI) for T in (33, 64, 70)],  # type: ignore[arg-type]
    *[Case(2, 1, 32, 32, 70, bits=bits, dtype=d, **KIVI)  # type: ignore[arg-type]
      for bits, d in ((2, "fp16"), (4, "bf16"), (8, "fp32"))],
    Case(4, 2, 24, 48, 52, S=3, bits=2, padded=True, window=20, **KIVI),  # type: ignore[arg-type]
    Case(4, 1, 64, 16, 90, bits=4, cache="kivi", group=32, residual=64, dtype="fp16"),
]  # fmt: skip


def random_cases(count: int, seed: int = 0) -> list[Case]:
    """Cases for the long run."""
    g = random.Random(seed)
    made = []
    for _ in range(count):
        cache = g.choice(["kv", "kv", "int8", "fp8", "kivi"])
        KV, repeat, S = g.choice([1, 2, 3]), g.choice([1, 2, 3, 4]), g.choice([1, 1, 2, 5, 16])
        D, E = (g.choice([4, 8, 12, 16, 20, 32, 40, 64]) for _ in range(2))
        group = g.choice([16, 32])
        if cache == "kivi":
            E = group * g.choice([1, 2])
        windowed = g.random() < 0.4
        made.append(Case(
            KV * repeat, KV, D, E, S + g.randrange(0, 90), S, g.choice([1, 2]),
            g.choice(["fp32", "fp16", "bf16"]), cache,
            g.choice([2, 4, 8]) if cache == "kivi" else 8,
            group if cache == "kivi" else 0, 2 * group if cache == "kivi" else 0,
            g.choice(["token", "channel"]), g.choice([1, 2, 3, 5]),
            g.choice([1, 3, 9, 40]) if windowed else 0, g.choice([1, 2]) if windowed else 1,
            g.choice([0, 2]) if windowed else 0, g.choice([0.0, 0.0, 5.0]), g.random() < 0.85,
            g.random() < 0.3, g.random() < 0.3, g.random() < 0.3,
        ))  # fmt: skip
    return made


def answer(case: Case) -> dict[str, Any]:
    """Errors of one case as shares of their bound; a wrong value's too, and whether runs agree."""
    import torch

    from llmc.codegen.attention.launch import attend
    from llmc.codegen.attention.rows import choose

    step = Step(case)
    problem = step.problem
    row, misfits = choose(problem)
    assert row is not None, misfits
    config = row.config(problem, case.B, case.T, case.S)
    config = dataclasses.replace(
        config, splits=case.splits, BT=16 if case.cache != "kivi" else config.BT
    )

    def launch() -> Any:
        return attend(row, problem, step.q, step.held, step.pos, step.sinks, step.slopes,
                      scale=step.scale, config=config)  # fmt: skip

    exact, bound = step.oracle()
    y = launch()
    found = {
        "finite": bool(y.isfinite().all()),
        "ratio": float(((y.double() - exact).abs() / bound).max()),
        # Runs are joined by one piece of text for all caches, so that some cases will do.
        "same_twice": case.cache == "kivi" or bool(torch.equal(y, launch())),
    }
    step.spoil()
    off = launch().double() - exact
    return {**found, "spoiled_ratio": float((off.abs() / bound).max())}


class Step:
    """The tensors of a case: a state with tokens in it, a step's own, and what it must give."""

    def __init__(self, case: Case) -> None:
        import torch

        from llmc.codegen.attention.problem import AttentionProblem
        from llmc.codegen.problem import DTYPES
        from llmc.compiler.ir.caches import CacheScheme
        from llmc.compiler.ir.dims import BATCH, PAST
        from llmc.compiler.ir.graph import State
        from llmc.compiler.ir.types import TensorType
        from llmc.compiler.runtime.cache import Cache

        self.case, g = case, torch.Generator().manual_seed(len(case.label) + case.T)
        self.g, self.dtype = g, DTYPES[case.dtype]
        types = tuple(TensorType((BATCH, case.KV, PAST, n), self.dtype) for n in (case.D, case.E))
        scheme, tensors = None, {}
        if case.cache != "kv":
            keys = "channel" if case.cache == "kivi" else case.keys
            scheme = CacheScheme(case.cache, case.bits, group=case.group or None,
                                 residual=case.residual, keys=keys)  # fmt: skip
            if case.cache != "kivi" and keys == "channel":
                top = 127.0 if case.cache == "int8" else 448.0
                tensors = {"key_scale": (torch.rand(case.KV, case.D, generator=g) + 2.5) / top}
        kept = None if scheme is None else {"kv0": (scheme, tensors)}
        cache = Cache([State("kv0", case.cache, types)], case.B, 64, "cpu", kept)
        self.state: Any = cache.states["kv0"]
        self.scale = case.D**-0.5
        self.sinks = torch.randn(case.H, generator=g).to(self.dtype) if case.sinks else None
        # Halves of each other, as models have them, the least 2**-4.
        heads = torch.arange(case.H)
        self.slopes = 2.0 ** -(1 + heads % 4).float() if case.slopes else None
        if case.T > case.S:
            self.state.append(*self._tokens(case.T - case.S, 0))
        k, v, self.pos, valid = self._tokens(case.S, case.T - case.S)
        self.q = self._rows(case.S, case.H, case.D)
        self.held = self.state.hold(k, v, self.pos, valid)
        kivi = case.cache == "kivi"
        self.problem = AttentionProblem(
            case.H, case.KV, case.D, case.E, case.S, case.dtype, case.cache,
            bits=16 if scheme is None else case.bits, group=case.group, residual=case.residual,
            keys="" if scheme is None else "group" if kivi else case.keys, causal=case.causal,
            window=case.window, dilation=case.dilation, first=case.first, softcap=case.softcap,
            sinks=case.sinks, slopes=case.slopes, valid=self.held.padded,
        )  # fmt: skip

    def _rows(self, tokens: int, heads: int, width: int) -> Any:
        """[B, heads, tokens, width], strided as a graph's transposed values are."""
        import torch

        shape = (self.case.B, tokens, heads, width)
        return torch.randn(*shape, generator=self.g).to(self.dtype).transpose(1, 2)

    def _tokens(self, count: int, at: int) -> tuple[Any, ...]:
        import torch

        case = self.case
        k, v = (self._rows(count, case.KV, n) for n in (case.D, case.E))
        pos, valid = torch.arange(at, at + count).expand(case.B, count), None
        if case.padded:
            gone = torch.tensor([3, *[0] * (case.B - 1)])[:, None]
            valid, pos = pos >= gone, (pos - gone).clamp_min(0)
        return k, v, pos.contiguous(), valid

    def kept(self) -> tuple[Any, Any]:
        """Keys and values [B, KV, T, *] in fp64, as the state's buffers say."""
        import torch

        case, found = self.case, []
        for side, width, n in ((self.held.keys, case.D, 0), (self.held.values, case.E, 1)):
            if case.cache == "kv":
                found.append(side.parts[0][:, :, : case.T].double())
                continue
            kept = self.state._sides[n]
            parts = [p[:, :, : side.due // m.step]
                     for p, m in zip(kept.parts, kept._made, strict=True)]  # fmt: skip
            coded = kept.codec.decode(parts, width, torch.float64)
            slots = (torch.arange(side.due, case.T) - side.base) % side.tail.shape[2]
            found.append(torch.cat([coded, side.tail[:, :, slots].double()], 2))
        return found[0], found[1]

    def oracle(self) -> tuple[Any, Any]:
        """The op row's reference in fp64, and how far a kernel may be from it.

        Sums of D products move a score by δ, so that weights move by 2δ of themselves; weights are
        rounded once, and so are KIVI's numbers and the queries that meet codes.
        """

        from llmc.compiler.ir.ops.attention import attention
        from llmc.compiler.ir.ops.heads import sloped

        case, held = self.case, self.held
        keys, values = self.kept()
        valid = None if held.valid is None else held.valid[:, : case.T]
        k_pos = held.pos[:, : case.T]
        slopes = None if self.slopes is None else self.slopes.double()
        args = (self.pos, k_pos, valid, sloped(slopes, self.pos, k_pos),
                None if self.sinks is None else self.sinks.double())  # fmt: skip
        how: dict[str, Any] = {
            "scale": self.scale, "causal": case.causal, "window": case.window or None,
            "softcap": case.softcap or None, "dilation": case.dilation, "first": case.first,
        }  # fmt: skip
        q = self.q.double()
        exact = attention(q, keys, values, *args, **how)
        sizes = attention(q, keys, values.abs(), *args, **how)
        repeated = keys.repeat_interleave(case.H // case.KV, 1).abs()
        scores = ((q.abs() @ repeated.transpose(-1, -2)).amax(-1) * self.scale).transpose(1, 2)
        wide, u = 2.0**-24, {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}[case.dtype]
        # Codes meet fp16 whatever the model's dtype, queries by their largest number.
        inner = 0.0 if case.cache == "kv" else max(wide, 2.0**-11) if case.dtype != "fp32" else wide
        moved = scores[..., None] * ((case.D + 8) * wide + 4 * inner) + 8 * wide * case.softcap
        moved = moved + 4 * wide * case.T * case.slopes
        share = 2 * moved + (case.T + 32) * 2 * wide + 2 * u + 4 * inner
        return exact, sizes * share + 2 * u * exact.abs() + 1e-9

    def spoil(self) -> None:
        """Move one value that every query of the first row may read: the newest token's first."""
        side = self.held.values
        if side.tail is None:
            side.parts[0][0, 0, self.held.tokens - 1, 0] += 8
        else:
            at = (self.held.tokens - 1 - side.base) % side.tail.shape[2]
            side.tail[0, 0, at, 0] += 8
