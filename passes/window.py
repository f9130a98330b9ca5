"""window: tokens read their neighbours, at a distance if asked, and the first tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..compiler.analysis.cacheable import argument
from ..compiler.ir.dims import same
from ..compiler.ir.errors import UsageError
from ..compiler.ir.graph import Program, info, tensor_type
from ..compiler.ir.ops import infer
from ..compiler.ir.ops.attention import MOST
from ..compiler.ir.refusal import Refusal
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Example, Lossy, Precondition, knob
from ..compiler.pipeline.listed import block_numbers
from ..compiler.pipeline.sites import Protecting
from ..compiler.pipeline.structure import Choice, Structural


@dataclass(frozen=True)
class ReadSite:
    """One attention: its block's index among ``blocks``, and the attributes that say what it reads.

    ``own`` says that queries and keys are the same tokens.
    """

    id: str
    segment: str
    node: str
    block: int
    blocks: int
    attrs: dict[str, Any]
    own: bool

    @property
    def kind(self) -> str:
        return "attention"


def _attentions(analysis: Analysis) -> Iterator[ReadSite | Refusal]:
    """Pattern: every attention; a program without any refuses."""
    program, count = analysis.program, dict[str, int]()
    home = {n: s.name for s in program.segments for n in s.nodes}
    for node in program.calls("llmc.attention"):
        segment = home[node.name]
        i = count[segment] = count.get(segment, -1) + 1
        yield ReadSite(
            f"{segment}/attention{i}", segment, node.name, analysis.block_of(segment),
            len(analysis.blocks), dict(node.kwargs), _own_keys(node),
        )  # fmt: skip
    if not count:
        why = "the program has no llmc.attention node"
        yield Refusal("window", program.output.name, why, "has_attention")


def _own_keys(node: fx.Node) -> bool:
    lengths = [tensor_type(n).shape[2] for n in node.args[:2] if isinstance(n, fx.Node)]
    return argument(node, 3, "q_pos") is argument(node, 4, "k_pos") and same(*lengths)


def _same_tokens(made: Any, site: ReadSite) -> str | None:
    return None if site.own else "it reads another text's keys, which have no distance to queries"


def _reads_less(made: Any, site: ReadSite) -> str | None:
    found = site.attrs.get("window")
    if site.attrs.get("dilation", 1) > 1 or site.attrs.get("first"):
        return "it has dilation or first tokens already, and two patterns together are no window"
    if found is None:
        return None
    if made.globals:
        return f"it has a window of {found} already: first tokens outside of it were never read"
    if made.reach > found or (made.reach == found and made.dilation == 1):
        return f"it has a window of {found} already, no wider than {made.reach}"
    return None


def _listed(made: Any, site: ReadSite) -> str | None:
    if made.blocks is None:
        return None
    wanted = block_numbers(made.blocks, "window:blocks", site.blocks)
    return None if site.block in wanted else f"blocks={made.blocks} leaves block {site.block} out"


@dataclass(frozen=True)
class Window(Protecting, Structural):
    """A token at p reads those at p, p-d, … p-(w-1)d, of size w and dilation d, and no others.

    All read the first ``globals`` tokens, which read all that causality lets them. The KV cache
    still keeps every token, so any of them can be read again after a rewind; on CPU a decoding step
    reads those in the window alone. A text of no more than w tokens reads as before (d = 1).
    """

    variants = {"window": {}}
    stage = "attention"
    effect = Lossy("perplexity")
    source = "Longformer, arXiv 2004.05150 §3.1"
    pattern = _attentions
    preconditions = (
        Precondition("same_tokens", _same_tokens),
        Precondition("reads_less", _reads_less),
        Precondition("listed", _listed),
    )
    hits = (Example("llama_gqa"), Example("sees_all"), Example("shared_keys"))
    misses = (Example("has_window", "reads_less"), Example("has_pattern", "reads_less"))

    size: int = knob(256, "tokens that a token reads, itself among them", lo=1, hi=MOST)
    dilation: int = knob(1, "distance of two neighbours in the window", lo=1, hi=1 << 16)
    globals: int = knob(0, "first tokens that all read and that read all", lo=0, hi=MOST)
    blocks: str | None = knob(None, "only these blocks, as in 3+5; -1 is the last")

    @property
    def reach(self) -> int:
        """How far back the window goes, the token itself counted."""
        return (self.size - 1) * self.dilation + 1

    def check(self) -> None:
        if self.size == 1 and self.dilation > 1:
            raise UsageError(
                f"window: expected neighbours that can be {self.dilation} apart, found size=1",
                hint="dilation=1, or a larger size",
            )
        if self.blocks is not None:
            block_numbers(self.blocks, "window:blocks")

    def predict(self, analysis: Analysis, sites: list[ReadSite]) -> Choice:
        more = {"dilation": self.dilation, "first": self.globals}
        attrs = {"window": self.size} | {
            k: v for k, v in more.items() if v != {"dilation": 1, "first": 0}[k]
        }
        rows = [
            {"site": s.id, "before": s.attrs.get("window"), "window": self.size,
             "dilation": self.dilation, "globals": self.globals}
            for s in sites
        ]  # fmt: skip
        return Choice({"attrs": attrs, "nodes": [s.node for s in sites]}, records=rows)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        for name in choice.data["nodes"]:
            node = program.node(name)
            node.kwargs = {**node.kwargs, **choice.data["attrs"]}
            found = replace(info(node), type=infer(node), made_by=self.called or "window")
            node.meta["llmc"] = found
        return []
