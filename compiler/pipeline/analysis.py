"""One program's analyses, computed once, and the patterns by which passes find their sites."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from ..analysis.blocks import apply_segments, is_block
from ..analysis.groups import Group, dependency_groups
from ..analysis.linears import ExpertSite, LinearSite, linear_sites
from ..analysis.migrate import MigrationSite, migration_sites
from ..ir.graph import Program, info
from ..ir.refusal import Refusal


class Analysis:
    """Analyses of a segmented program; every result is derived from the graph alone."""

    def __init__(self, program: Program) -> None:
        if not program.segments:
            apply_segments(program)
        self.program = program

    @cached_property
    def linears(self) -> list[LinearSite | ExpertSite | Refusal]:
        return linear_sites(self.program)

    @property
    def weights(self) -> Iterator[LinearSite | Refusal]:
        """Linears, and the two stacked weights of each experts call."""
        for site in self.linears:
            yield from site.weights if isinstance(site, ExpertSite) else (site,)

    @cached_property
    def migrations(self) -> list[MigrationSite | Refusal]:
        return migration_sites(self.program)

    @cached_property
    def groups(self) -> list[Group]:
        return dependency_groups(self.program)

    @cached_property
    def blocks(self) -> dict[str, int]:
        """Index of each repeated block by name, in order."""
        names = [s.name for s in self.program.segments if is_block(s.name)]
        return {name: i for i, name in enumerate(names)}

    def block_of(self, segment: str) -> int:
        """Index of the block, -1 outside of blocks."""
        return self.blocks.get(segment, -1)

    def path(self, node: str) -> str:
        """Module path of a node, for people."""
        return info(self.program.node(node)).path


def linear_weights(analysis: Analysis) -> Iterator[LinearSite | Refusal]:
    """Pattern: every matrix that multiplies a value, x @ Wᵀ, and the stacked ones of experts."""
    yield from analysis.weights


def scale_migrations(analysis: Analysis) -> Iterator[MigrationSite | Refusal]:
    """Pattern: every value whose channels can be rescaled upstream and in all its readers."""
    yield from analysis.migrations
