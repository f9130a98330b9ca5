"""Which linear makes the norm of its own result, before the sum behind that."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..compiler.ir.graph import info
from ..compiler.ir.refusal import Refusal
from ..compiler.ir.types import same_type
from .fuse_before import norm_refusal
from .fuse_chain import Core
from .fuse_nodes import is_op, is_sum, only_user, refusal
from .fuse_sums import tails_of


def norms_of(
    cores: Sequence[Core], home: dict[str, str]
) -> tuple[dict[fx.Node, fx.Node], list[Refusal]]:
    """Value of a linear, an activation or a gate product -> the rms_norm that alone reads it, where
    a sum alone reads that; and why a kernel cannot make some of them.

    A norm that linears read is left to them: their kernels make it of what they read.
    """
    found, refused = dict[fx.Node, fx.Node](), list[Refusal]()
    for tail in tails_of(cores):
        norm = only_user(tail)
        if norm is None or not is_op(norm, "llmc.rms_norm") or norm.args[0] is not tail:
            continue
        near = home.get(norm.name) == home.get(tail.name)
        if not (near and is_sum(only_user(norm)) and same_type(info(norm).type, info(tail).type)):
            continue
        why = norm_refusal(norm)
        if why is None:
            found[tail] = norm
        else:
            refused.append(refusal(norm, why.reason, why.predicate))
    return found, refused
