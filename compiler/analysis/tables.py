"""Tables of embeddings that tokens look up, and the heads that share them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ir.graph import Program, info, tensor_type
from ..ir.refusal import Refusal
from .blocks import segments_of
from .flow import LINEAR
from .ties import op_name

EMBEDDING = "aten.embedding.default"


@dataclass(frozen=True)
class TableSite:
    """One table [V, H] that is looked up by the model's tokens, and by nothing else.

    Attributes:
        id: ``<segment>/embedding<i>``; node: its first lookup; param: the table.
        lookups: calls that look it up; heads: linears x·Eᵀ whose weight it is, a tied head.
        vocab, width: V and H; bytes of one number; tokens: name of the input that is looked up.
    """

    id: str
    segment: str
    node: str
    param: str
    lookups: tuple[str, ...]
    heads: tuple[str, ...]
    vocab: int
    width: int
    itemsize: int
    tokens: str

    @property
    def kind(self) -> str:
        return "embedding"

    @property
    def bytes(self) -> int:
        """Of the table as it is stored."""
        return self.vocab * self.width * self.itemsize


def table_sites(program: Program) -> list[TableSite | Refusal]:
    """Every table that is looked up, in graph order; why, where it is no site."""
    home = {n: s.name for s in segments_of(program) for n in s.nodes}
    count: dict[str, int] = {}
    seen: set[fx.Node] = set()
    out: list[TableSite | Refusal] = []
    for node in program.calls(EMBEDDING):
        table = node.args[0]
        if not isinstance(table, fx.Node) or table in seen:
            continue
        seen.add(table)
        segment = home[node.name]
        i = count[segment] = count.get(segment, -1) + 1
        found = _site(program, node, table, f"{segment}/embedding{i}", segment)
        if isinstance(found, TableSite):
            out.append(found)
            continue
        predicate, why, culprit = found
        out.append(Refusal("tables", culprit.name, why, predicate, info(culprit).path))
    return out


def _site(
    program: Program, node: fx.Node, table: fx.Node, name: str, segment: str
) -> TableSite | tuple[str, str, fx.Node]:
    param = program.param_of(table)
    if param is None or not param.dtype.is_floating_point or param.keep:
        return "table_is_parameter", f"{table.name} is not a stored table of numbers", node
    lookups, heads = [], []
    for user in table.users:
        places = [i for i, a in enumerate(user.args) if a is table]
        if op_name(user) == EMBEDDING and places == [0]:
            lookups.append(user)
        elif op_name(user) == LINEAR and places == [1]:
            heads.append(user)
        else:
            what = op_name(user) or "the program's result"
            return "looked_up_alone", f"{what} ({user.name}) reads the table as well", user
    read = {u.args[1] for u in lookups}
    tokens = next(iter(read))
    if len(read) > 1 or not isinstance(tokens, fx.Node) or tokens.name != "input_ids":
        found = ", ".join(sorted(str(r) for r in read))
        return "looked_up_by_tokens", f"it is looked up by {found}, not by the tokens", node
    vocab, width = (int(str(d)) for d in tensor_type(table).shape)
    return TableSite(
        name, segment, lookups[0].name, param.name, tuple(n.name for n in lookups),
        tuple(n.name for n in heads), vocab, width, param.dtype.itemsize, tokens.name,
    )  # fmt: skip
