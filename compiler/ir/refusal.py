"""A refusal: a place where a pass nearly applied, with the reason and the culprit."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Refusal:
    """Why something was left as it is.

    Attributes:
        by: the pass or analysis that refused.
        node: name of the culprit node.
        reason: one sentence with the values found.
        predicate: short stable name of the failing condition, e.g. ``"all_users_rewritten"``.
        path: module path of the node, for people.
    """

    by: str
    node: str
    reason: str
    predicate: str
    path: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        place = f"{self.node} ({self.path})" if self.path else self.node
        return f"{self.by} refused {place}: {self.reason} [{self.predicate}]"
