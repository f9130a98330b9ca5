"""What passes over embedding tables share: sites, counts of tokens, new calls in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.tables import TableSite, table_sites
from ..ir.errors import UsageError
from ..ir.graph import Param, Program
from ..ir.refusal import Refusal
from .analysis import Analysis
from .compensate import free_name
from .structure import Structural


def tables(analysis: Analysis) -> Iterator[TableSite | Refusal]:
    """Pattern: every table that tokens look up."""
    yield from table_sites(analysis.program)


def token_counts(tokens: Tensor, vocab: int) -> Tensor:
    """How often each token occurs, fp64 [vocab], and half a time more than that."""
    return torch.bincount(tokens.flatten(), minlength=vocab)[:vocab].double() + 0.5


@dataclass(frozen=True)
class TablePass(Structural):
    """Base of the passes that store a table in another form; its sites are :class:`TableSite`."""

    stage = "embedding"
    pattern = tables

    def budget(self, site: TableSite, remove: float) -> int:
        """Bytes that may be left of the table."""
        return int((1 - remove) * site.bytes + 1e-6)

    def saves(self, site: TableSite, stored: int, what: str) -> None:
        """Raises UsageError where that is no less than the table."""
        if stored >= site.bytes:
            raise UsageError(
                f"{self.called}: expected {what} to save bytes, found {stored:,} for the table's "
                f"{site.bytes:,}", where=site.id,
            )  # fmt: skip


class Swap:
    """Puts other calls in the place of a table's lookups and heads, in place.

    Args:
        tensors: of the new parameters by name; those that are missing stay empty.
    Attributes:
        added: names of the new parameters.
    """

    def __init__(
        self, program: Program, site: TableSite, tensors: dict[str, Tensor], made_by: str
    ) -> None:
        self.program, self.site, self.tensors, self.made_by = program, site, tensors, made_by
        self.table = program.param_node(site.param)
        self.added: list[str] = []

    def param(self, end: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> fx.Node:
        """A new parameter of the table's dtype, or of integers that stay as they are."""
        name = part_name(self.program, self.site.param, end)
        kind = self.program.params[self.site.param].dtype if dtype is None else dtype
        param = Param(name, shape, kind, trained=dtype is None, keep=dtype is not None)
        self.added.append(name)
        return self.program.add_param(
            param, self.tensors.get(name), before=self.table, made_by=self.made_by, like=self.table
        )

    def call(self, op: str, *args: Any, at: fx.Node, **kwargs: Any) -> fx.Node:
        """A new call in front of ``at``."""
        return self.program.emit(op, *args, before=at, made_by=self.made_by, like=at, **kwargs)

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Readers of ``node`` read ``new``."""
        node.replace_all_uses_with(new)
        self.program.prune(node)

    @property
    def lookups(self) -> list[fx.Node]:
        return [self.program.node(n) for n in self.site.lookups]

    @property
    def heads(self) -> list[fx.Node]:
        return [self.program.node(n) for n in self.site.heads]


def part_name(program: Program, param: str, end: str) -> str:
    """Name of a new part of a table."""
    return free_name(program, f"{param}_{end}")


def bias_of(head: fx.Node) -> Any:
    """The bias of a linear, None where it has none."""
    return head.args[2] if len(head.args) > 2 else head.kwargs.get("bias")


def found_tables(program: Program) -> dict[str, TableSite]:
    """Sites of a segmented program by id."""
    return {s.id: s for s in table_sites(program) if isinstance(s, TableSite)}
