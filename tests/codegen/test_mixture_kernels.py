"""Both kernels of a layer of experts under the interpreter, against the references of their ops.

Triton reads TRITON_INTERPRET at import, so one child process computes all cases (this file as a
script) and the tests judge its answers. The bound is K·2⁻²⁴·Σ|a||w| for sums and one roundoff of
x's dtype for each rounding to it, carried through the gate and the shares of the experts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch
from interpreter import interpreted

from llmc.codegen import meaning
from llmc.codegen.kernels import row
from llmc.codegen.mixture import fit, routing
from llmc.codegen.mixture.choice import choose, read_choice
from llmc.codegen.problem import DTYPES, Problem
from llmc.codegen.samples import random_parts

ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-22}
DENSE = {"weights": "dense", "scale_dtype": "", "bits": 16}


@dataclass(frozen=True)
class Layer:
    """A layer of experts [H -> I -> H] and a call of it.

    ``how``: "route" (the first launch chooses), "alike" (so for tokens that are all the same),
    "told", or "one" (told that all tokens go to expert 1).
    """

    row: str
    T: int
    E: int = 4
    k: int = 2
    H: int = 128
    inner: int = 32
    how: str = "route"
    kind: str = "softmax sum"
    norm: bool = True
    residual: bool = True
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[Problem, Problem]:
        common = {"experts": self.E, "chosen": self.k, **self.more}
        route = self.how in ("route", "alike")
        ahead = {"route": self.kind, "norm": self.norm, "eps": 1e-6} if route else {}
        up = Problem(2 * self.E * self.inner, self.H, routed="up", pairs="gate", act="silu",
                     **{**common, **ahead})  # fmt: skip
        down = Problem(self.E * self.H, self.inner, routed="down", residual=self.residual, **common)
        return up, down

    @property
    def parts(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        up, down = (random_parts(p, seed) for seed, p in enumerate(self.problems))
        if "router" in up:
            up["router"] = up["router"] / 4
        return up, down

    def clear(self, products: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """Whether each token chooses the same where products are a bit off, any way of eight."""
        choice, correction = read_choice(self.kind), self.parts[0].get("correction")
        assert choice is not None
        always = self.problems[0].always
        index = choose(choice, products, self.k - always, correction, always)[0]
        same = torch.ones(len(products), dtype=torch.bool)
        for _ in range(8):
            off = torch.randint(0, 2, products.shape, generator=g) * 0.1 - 0.05
            other = choose(choice, products + off, self.k - always, correction, always)[0]
            same &= (other == index).all(-1)
        return same

    def inputs(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x and what else a call brings; where the kernel chooses, tokens whose choice is clear."""
        g = torch.Generator().manual_seed(7)
        up, dtype = self.problems[0], DTYPES[self.problems[0].x_dtype]
        x = torch.randn(64 * self.T if up.route else self.T, self.H, generator=g).to(dtype)
        sides = {}
        if up.route:
            parts = wide(self.parts[0])
            h = meaning.normed(up, parts, x.double()) if up.norm else x.double()
            x = x[self.clear(h @ parts["router"].T, g)][: 1 if self.how == "alike" else self.T]
            assert len(x) == (1 if self.how == "alike" else self.T)
            x = x.expand(self.T, -1).contiguous() if self.how == "alike" else x
        else:
            index = torch.rand(self.T, self.E, generator=g).argsort(-1)[:, : self.k]
            sides["index"] = torch.ones_like(index) if self.how == "one" else index
            sides["weight"] = torch.rand(self.T, self.k, generator=g).to(dtype)
        if self.residual:
            sides["residual"] = torch.randn(self.T, self.H, generator=g).to(dtype)
        return x, sides


LAYERS = {
    "one token": Layer("w4a16", 1, H=256),
    "zero points in bf16": Layer("w4a16", 17, E=8, k=4, kind="softmax", more={
        "asym": True, "group": 32, "x_dtype": "bf16", "scale_dtype": "bf16"}),
    "fp32, five experts": Layer("w4a16", 3, E=5, H=192, more={"x_dtype": "fp32"}),
    "no norm, all experts": Layer("w4a16", 3, E=4, k=4, norm=False, residual=False),
    "all alike": Layer("w4a16", 17, how="alike", k=1, kind="softmax"),
    "all to one": Layer("w4a16", 17, how="one", k=1),
    "eight bits, told": Layer("w8a16", 5, E=7, how="told", residual=False, more={"bits": 8}),
    "2:4": Layer("w4a16_24", 3, k=1, H=320, more={"n": 2, "m": 4, "group": 64}),
    "nf4": Layer("w4_lut", 3, k=1, more={"weights": "table", "levels": "nf", "group": 64}),
    "six bits": Layer("w6a16", 3, more={"bits": 6, "group": 32, "asym": True}),
    "signs": Layer("w_signs", 3, k=1, more={"weights": "signs", "bits": 2, "group": 64}),
    "dense": Layer("w16", 3, more={**DENSE, "x_dtype": "bf16"}),
    "dense 2:4": Layer("w16_24", 3, how="told", more={**DENSE, "n": 2, "m": 4}),
    "sigmoids of groups": Layer("w4a16", 5, E=8, kind=(
        "sigmoid added groups=4:2:two sum+1e-20 times=2.5")),
    "corrected, in bf16": Layer("w4a16", 3, E=5, kind="softmax added sum>1e-12", more={
        "x_dtype": "bf16", "scale_dtype": "bf16"}),
    "the largest of three groups": Layer("w4a16", 17, E=12, k=3, H=192, norm=False, kind=(
        "softmax groups=3:2:max times=0.5"), more={"x_dtype": "fp32"}),
    "router in fp32": Layer("w4a16", 3, norm=False, kind="softmax sum wide", more={
        "x_dtype": "bf16", "scale_dtype": "bf16"}),
    "two more for all": Layer("w4a16", 5, E=7, k=4, more={"always": 2}),
    "two weighed for all": Layer("w8a16", 3, E=6, k=3, kind="softmax times=2.5 gated", more={
        "always": 2, "bits": 8, "x_dtype": "bf16", "scale_dtype": "bf16"}),
    "one more of groups": Layer("w4a16", 2, E=9, k=3, kind=(
        "sigmoid added groups=4:2:two sum+1e-20 gated"), more={"always": 1}),
    "many, and one for all": Layer("w4a16", routing.MOST // 2 + 3, E=5, k=2, kind=(
        "softmax gated"), more={"always": 1}),
    "many": Layer("w4a16", routing.MOST // 2 + 3, E=8, kind="sigmoid added sum>9.0 wide"),
}  # fmt: skip


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the child process found."""
    found: dict[str, dict[str, Any]] = interpreted(
        __file__, tmp_path_factory.mktemp("kernel_cache")
    )
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_two_launches_mean_what_the_ops_mean(name: str, answers: dict[str, Any]) -> None:
    """Within the bound, by two launches; the same bits again; counters are left at zero."""
    found = answers[name]
    assert found["worst"] <= 1.0
    assert found["again"], "other bits in a second call"
    assert found["counters"] == 0
    assert found["shares"] <= 1.0, "weights of experts"
    assert found["launches"] == (3 if name.startswith("many") else 2)


@pytest.mark.parametrize("name", [n for n in LAYERS if not n.startswith("many")])
def test_the_kernel_chooses_as_topk_does(name: str, answers: dict[str, Any]) -> None:
    """Exactly the experts of the reference, slot by slot, in the order of experts."""
    found, layer = answers[name], LAYERS[name]
    assert found["chosen"] == found["expected"]
    assert found["sorted"], "pairs of an expert are not in the order of tokens"
    if layer.how == "one":
        assert found["starts"] == [0, 0, 17, 17, 17]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("untold", "expected index, weight beside x, found nothing"),
        ("float index", "expected index in int32 or int64"),
        ("short", "expected weight [5, 2], found [5, 1]"),
        ("columns", "expected x [5, 128], found [5, 127]"),
        ("swapped", "expected weights routed up and down, found down and up"),
        ("linear", "call fused_mixture"),
    ],
)
def test_calls_that_do_not_fit_are_refused(call: str, words: str, answers: dict[str, Any]) -> None:
    assert words in answers["refused"][call]


# ** bounds **


def wide(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in parts.items()}


def slipped(layer: Layer, h: torch.Tensor, router: torch.Tensor) -> float:
    """By which part of itself a share may be off: roundings of h are as many as there are columns,
    and none like another."""
    sums = layer.problems[0].K * 2.0**-24 * (h.abs() @ router.abs().T)
    rounded = 6 * ROUNDOFF[layer.problems[0].x_dtype] * (h.square() @ router.square().T).sqrt()
    exact = layer.problems[0].wide_router and not layer.norm  # nothing is rounded
    return 2 * float((sums if exact else sums + rounded).amax()) + 2.0**-18


def bound(layer: Layer, x: torch.Tensor, sides: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far each element may be off; x and sides in fp64."""
    (up, down), (ahead, behind) = layer.problems, map(wide, layer.parts)
    u = ROUNDOFF[up.x_dtype]
    h = meaning.normed(up, ahead, x) if up.norm else x
    index, share = sides.get("index"), sides.get("weight")
    slip = 0.0
    if up.route:
        index, share = meaning.chosen(up, ahead, h)
        slip = slipped(layer, h, ahead["router"])
    assert index is not None
    assert share is not None
    W, V = (
        meaning.weight(p, parts).reshape(p.experts, -1, p.K)
        for p, parts in ((up, ahead), (down, behind))
    )
    off = sides["residual"].abs() * u if layer.residual else torch.zeros_like(x)
    total = off.clone()
    for slot in range(layer.k):
        of, s = index[:, slot], share[:, slot, None]
        sums = torch.einsum("tk,tnk->tn", h, W[of])
        near = (3 * u + 2 * up.K * 2.0**-24) * torch.einsum("tk,tnk->tn", h.abs(), W[of].abs())
        (gate, lift), (g_off, l_off) = sums.chunk(2, -1), near.chunk(2, -1)
        act = torch.nn.functional.silu(gate)
        inner = act * lift
        wrong = 1.1 * g_off * (lift.abs() + l_off) + act.abs() * l_off + 2 * u * inner.abs()
        most = torch.einsum("ti,toi->to", inner.abs(), V[of].abs())
        more = torch.einsum("ti,toi->to", wrong, V[of].abs())
        off += s.abs() * (more + (down.K * 2.0**-23 + slip) * most)
        total += (s * torch.einsum("ti,toi->to", inner, V[of])).abs()
    return off + (u + 2.0**-20) * total + 2.0**-22


# ** near misses **

UP = Layer("w4a16", 1).problems[0]
DOWN = Layer("w4a16", 1).problems[1]


@pytest.mark.parametrize(
    ("problem", "change", "name"),
    [
        (UP, {"N": 4 * 96}, "N"),
        (UP, {"N": 4 * 64 + 2}, "N"),
        (UP, {"chosen": 5}, "chosen"),
        (UP, {"chosen": 0}, "chosen"),
        (UP, {"experts": 0}, "experts"),
        (UP, {"experts": 1025, "N": 1025 * 64}, "experts"),
        (UP, {"rank": 16}, "rank"),
        (UP, {"sparse": True}, "sparse"),
        (UP, {"smooth": True}, "smooth"),
        (UP, {"bias": True}, "bias"),
        (UP, {"centred": True}, "centred"),
        (UP, {"out_norm": True}, "out_norm"),
        (UP, {"outliers": 32}, "outliers"),
        (UP, {"rounds": "int8 token"}, "rounds"),
        (UP, {"residual": True}, "residual"),
        (UP, {"pairs": ""}, "pairs"),
        (UP, {"route": ""}, "norm"),
        (UP, {"route": "relu"}, "route"),
        (UP, {"K": 1 << 23, "N": 4 * 512}, "N"),
        (DOWN, {"norm": True}, "norm"),
        (DOWN, {"route": "softmax"}, "route"),
        (DOWN, {"act": "silu"}, "act"),
        (DOWN, {"routed": ""}, "experts"),
    ],
)
def test_what_is_just_missed_is_refused_by_field(
    problem: Problem, change: dict[str, Any], name: str
) -> None:
    assert row("w4a16").misfits(problem) == []
    found = row("w4a16").misfits(replace(problem, **change))
    assert name in [m.field for m in found], [str(m) for m in found]


@pytest.mark.parametrize("name", ["w4_bitmap", "w16_bitmap", "w8a8", "fp8", "factors"])
def test_rows_of_other_templates_refuse_experts(name: str) -> None:
    assert "routed" in [m.field for m in row(name).misfits(UP)]


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("BM", [8, 16])
def test_there_are_programs_for_any_choice(tokens: int, BM: int) -> None:
    """The most tiles that a choice needs, by trying to need more."""
    problem = replace(UP, experts=5, N=5 * 64, chosen=3)
    pairs = tokens * 3
    best = 0
    for heavy in range(pairs + 1):
        light = min(4, pairs - heavy)
        counts = [pairs - light] + [1] * light
        best = max(best, sum(-(-c // BM) for c in counts if c))
    assert best <= fit.tiles(problem, tokens, BM)


def test_a_token_reads_the_experts_that_it_chose_alone() -> None:
    problem = replace(UP, experts=64, N=64 * 512, K=1024, route="", norm=False, eps=0.0)
    one, few, most = (row("w4a16").bytes_moved(problem, t) for t in (1, 4, 32))
    assert (few, most) == (4 * one, 32 * one)
    weights = 2 * 512 * 1024 // 2
    assert weights < one < 1.1 * weights
    assert row("w4a16").bytes_moved(problem, 64) < 33 * one


# ** the child process **


def _call(layer: Layer) -> dict[str, Any]:
    from llmc.codegen import calls, counters
    from llmc.codegen.mixture.launch import fused_mixture
    from llmc.codegen.prepack import prepack

    made, launched = [], []
    before = {n: getattr(routing, n) for n in ("empty", "told")}
    call = calls.Call.__call__

    def seen(name: str) -> Any:
        def make(*given: Any) -> Any:
            made.append(before[name](*given))
            return made[-1]

        return make

    def counted(self: Any, tensors: Any) -> None:
        launched.append(self.function)
        call(self, tensors)

    for name in before:
        setattr(routing, name, seen(name))
    calls.Call.__call__ = counted  # type: ignore[method-assign]
    up, down = (
        prepack(row(layer.row), p, **parts)
        for p, parts in zip(layer.problems, layer.parts, strict=True)
    )
    x, sides = layer.inputs()
    y = fused_mixture(up, down, x, **sides)
    launches = len(launched)
    again = layer.T > 64 or torch.equal(fused_mixture(up, down, x, **sides), y)
    calls.Call.__call__ = call  # type: ignore[method-assign]
    for name, function in before.items():
        setattr(routing, name, function)
    full = wide(sides)
    exact = meaning.mixture(
        *layer.problems, *map(wide, layer.parts), x.double(), full.get("residual"),
        full.get("index"), full.get("weight"),
    )  # fmt: skip
    far = (y.double() - exact).abs() / bound(layer, x.double(), full)
    found = made[0]
    order, starts = found.order.long(), found.starts.long()
    chosen = torch.empty_like(order)
    for e in range(layer.E):
        chosen[order[starts[e] : starts[e + 1]]] = e
    problem, ahead = layer.problems[0], wide(layer.parts[0])
    h = meaning.normed(problem, ahead, x.double()) if problem.norm else x.double()
    slip, expected, share = 2.0**-18, full.get("index"), full.get("weight")
    if problem.route:
        slip = slipped(layer, h, ahead["router"])
        expected, share = meaning.chosen(problem, ahead, h)
    assert expected is not None
    assert share is not None
    off = (found.shares.double() - share.flatten()).abs() / share.flatten() / slip
    inside = [order[starts[e] : starts[e + 1]] for e in range(layer.E)]
    left = [t for sets in counters._SETS.values() for t in sets]
    return {
        "worst": float(far.max()), "again": again, "launches": launches,
        "chosen": chosen.tolist(), "expected": expected.flatten().tolist(),
        "shares": float(off.max()), "sorted": all(torch.equal(i, i.sort().values) for i in inside)
        and torch.equal(found.where.long()[order], torch.arange(len(order))),
        "starts": starts.tolist(), "counters": sum(int(t.abs().sum()) for t in left),
    }  # fmt: skip


def _refused() -> dict[str, str]:
    from llmc.codegen.launch import fused_linear
    from llmc.codegen.mixture.launch import fused_mixture
    from llmc.codegen.prepack import prepack
    from llmc.compiler.ir.errors import UsageError

    layer = LAYERS["eight bits, told"]
    up, down = (
        prepack(row(layer.row), p, **parts)
        for p, parts in zip(layer.problems, layer.parts, strict=True)
    )
    x, sides = layer.inputs()
    calls = {
        "untold": lambda: fused_mixture(up, down, x),
        "float index": lambda: fused_mixture(up, down, x, **sides | {"index": sides["weight"]}),
        "short": lambda: fused_mixture(up, down, x, **sides | {"weight": sides["weight"][:, :1]}),
        "columns": lambda: fused_mixture(up, down, x[:, :127], **sides),
        "swapped": lambda: fused_mixture(down, up, x, **sides),
        "linear": lambda: fused_linear(up, x),
    }
    texts = {}
    for name, call in calls.items():
        try:
            call()
        except UsageError as error:
            texts[name] = str(error)
    return texts


if __name__ == "__main__":
    import sys
    import time

    answer: dict[str, Any] = {"refused": _refused()}
    for label, case in LAYERS.items():
        begin = time.thread_time()
        answer[label] = _call(case)
        told = {k: v for k, v in answer[label].items() if k in ("worst", "again", "shares")}
        print(label, asdict(case)["row"], told, time.thread_time() - begin, file=sys.stderr)
    print(json.dumps(answer))
