"""How a token chooses its experts, as data, and as the words of `Problem.route`.

    softmax sum
    sigmoid added groups=8:4:two sum+1e-20 times=2.5 wide

Each expert has a score: a softmax over the products with the router, or the sigmoid of its own.
What a token chooses by are the scores, where ``added`` beside a stored number of each expert, and
where there are groups only in those that are best. What it weighs by are the scores alone. Of equal
scores, as sigmoids of large products are, kernels choose the first, and torch whichever it finds.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """A way to choose experts and to weigh them; the default is that of a kernel that is told.

    Attributes:
        score: "softmax" over all experts or "sigmoid" of each; "" where nothing is chosen.
        added: whether a vector [E] is added to scores before experts are chosen by them.
        groups, kept: into how many groups of neighbours experts are cut, and in how many of those a
            token chooses; 0 where it chooses among all. by: what a group is chosen by, its largest
            score ("max") or the sum of its two largest ("two").
        sum: whether weights are divided by the sum of those of the token, plus ``eps``, or by
            ``least`` where that is larger.
        times: what weights are multiplied by in the end.
        gated: whether the experts that all tokens go to are weighed by the sigmoid of one more
            product, the last; else by 1.
        wide: whether x is multiplied by a router in fp32, whatever x is in.
    """

    score: str = ""
    added: bool = False
    groups: int = 0
    kept: int = 0
    by: str = ""
    sum: bool = False
    eps: float = 0.0
    least: float = 0.0
    times: float = 1.0
    gated: bool = False
    wide: bool = False

    @property
    def plain(self) -> bool:
        """A softmax of which the largest are weights, divided by their sum or not: the largest
        products are chosen, so only those need be exponentials."""
        return self == Choice("softmax", sum=self.sum, gated=self.gated, wide=self.wide)

    def __str__(self) -> str:
        words = [self.score, *(["added"] if self.added else [])]
        words += [f"groups={self.groups}:{self.kept}:{self.by}"] if self.groups else []
        more = f"+{self.eps!r}" if self.eps else f">{self.least!r}" if self.least else ""
        words += [f"sum{more}"] if self.sum else []
        words += [f"times={self.times!r}"] if self.times != 1.0 else []
        words += ["gated"] if self.gated else []
        words += ["wide"] if self.wide else []
        return " ".join(words)


_WORDS = re.compile(
    r"(?P<score>softmax|sigmoid)(?P<added> added)?"
    r"(?: groups=(?P<groups>\d+):(?P<kept>\d+):(?P<by>max|two))?"
    r"(?P<sum> sum(?:\+(?P<eps>[^ ]+)|>(?P<least>[^ ]+))?)?(?: times=(?P<times>[^ ]+))?"
    r"(?P<gated> gated)?(?P<wide> wide)?"
)


@functools.lru_cache(256)
def read_choice(text: str) -> Choice | None:
    """The choice that `Problem.route` says, which ``str`` writes the same; None of another text."""
    if not text:
        return Choice()
    found = _WORDS.fullmatch(text)
    if found is None:
        return None
    try:
        eps, least, times = (
            float(found[n] or d) for n, d in (("eps", 0), ("least", 0), ("times", 1))
        )
    except ValueError:
        return None
    made = Choice(
        found["score"], bool(found["added"]), int(found["groups"] or 0), int(found["kept"] or 0),
        found["by"] or "", bool(found["sum"]), eps, least, times,
        bool(found["gated"]), bool(found["wide"]),
    )  # fmt: skip
    numbers = all(map(math.isfinite, (eps, least, times))) and min(eps, least) >= 0
    return made if numbers and str(made) == text else None


class Routes(tuple[object, ...]):
    """Choices of `route`: none, or any words that say one (what experts must be, `fit` asks)."""

    def __new__(cls) -> Routes:
        return super().__new__(cls, ("", "softmax or sigmoid, then words of what is chosen"))

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and read_choice(text) is not None


def unfit(choice: Choice, experts: int, chosen: int) -> str:
    """What a choice of ``chosen`` among so many experts is expected to be, "" where it is that."""
    if not choice.groups:
        return ""
    size = experts // choice.groups
    if experts % choice.groups or size < 1 + (choice.by == "two"):
        least = "two or more" if choice.by == "two" else "one or more"
        return f"groups of {least} experts, as many in each, of {experts}"
    if not 1 <= choice.kept <= choice.groups or choice.kept * size < chosen:
        return f"groups kept among {choice.groups} that hold {chosen} experts"
    return ""


def choose(
    choice: Choice, products: torch.Tensor, count: int, correction: torch.Tensor | None = None,
    always: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Index and weight [T, count + always] of the products with a router [T, E], in their dtype.

    correction: [E], where one is added. always: how many experts behind those that are chosen from
    every token goes to. Among equal scores `torch.topk` says which are chosen.
    """
    gate = products.new_ones(len(products), 1)
    if choice.gated:
        products, gate = products[:, :-1], products[:, -1:].sigmoid()
    scores = products.sigmoid() if choice.score == "sigmoid" else products.softmax(-1)
    wanted = scores if correction is None else scores + correction.to(scores.dtype)
    if choice.groups:
        wanted = wanted.masked_fill(~_kept(choice, wanted), float("-inf"))
    index = wanted.topk(count).indices
    weight = scores.gather(-1, index)
    if choice.sum:
        whole = weight.sum(-1, keepdim=True) + choice.eps
        weight = weight / whole.clamp(min=choice.least)
    more = torch.arange(always, device=index.device) + products.shape[1]
    index = torch.cat([index, more.expand(len(index), -1)], -1)
    return index, torch.cat([weight * choice.times, gate.expand(-1, always)], -1)


def _kept(choice: Choice, wanted: torch.Tensor) -> torch.Tensor:
    """Whether each expert [T, E] is of a group that is chosen from."""
    groups = wanted.unflatten(-1, (choice.groups, -1))
    best = groups.amax(-1) if choice.by == "max" else groups.topk(2).values.sum(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool)
    chosen = chosen.scatter(-1, best.topk(choice.kept).indices, True)
    return chosen.repeat_interleave(groups.shape[-1], -1)
