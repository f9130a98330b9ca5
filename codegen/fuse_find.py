"""Which linears have a kernel, each by itself: the ground that fusing stands on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from ..compiler.ir.graph import Program
from ..compiler.ir.refusal import Refusal
from .fuse_before import read_before
from .fuse_chain import DENSE, Core, read_coded_factors, read_core, read_factors
from .fuse_nodes import LINEAR, MAKER, Accept, Unfit, is_op, is_sum, only_user, refusal
from .fuse_turned import left_out
from .fuse_unit import Unit
from .problem import Problem

Found = tuple[list[Core], list[Refusal]]


def find(program: Program, accept: Accept, features: Collection[str]) -> Found:
    """Every linear as a core that has a kernel, or a refusal, in graph order.

    Sparse entries beside a weight that no kernel takes become a call of their own first.
    """
    part_sparse(program, accept, features)
    linears = list(program.calls(LINEAR))
    taken: set[fx.Node] = set()
    found: dict[fx.Node, Core | Refusal] = {}
    read: dict[fx.Node, list[Core]] = {}
    for linear in linears:
        try:
            read[linear] = read_core(program, linear)
        except Unfit as why:
            found[linear] = refusal(linear, why.reason, why.predicate)
    dense = [n for n, cores in read.items() if plain(cores[-1].problem)]
    coded = [n for n in read if n not in dense]
    # Those with something beside them first: their sides are linears too; then products of codes.
    alone = [n for n in coded if len(read[n]) == 1]
    for linear in [n for n in coded if n not in alone]:
        if linear not in taken:
            found[linear] = best(read[linear], accept, features)
            _take(found[linear], taken)
    told = _factors_of_codes(alone, accept, features, found, taken)
    for linear in alone:
        if linear not in taken:
            found[linear] = best(read[linear], accept, features)
            _take(found[linear], taken)
    # Dense weights with a side, then products of two factors, before any is looked at alone.
    for linear in dense:
        if len(read[linear]) > 1 and linear not in taken and "dense" in features:
            answer = best(read[linear][:-1], accept, features)
            if isinstance(answer, Core):
                found[linear] = answer
                _take(answer, taken)
    for linear in dense:
        core = read_factors(linear) if linear not in taken and "factors" in features else None
        if core is not None and not taken & core.nodes:
            answer = best([core], accept, features)
            if isinstance(answer, Core):
                found[linear] = answer
                _take(answer, taken)
    for linear in dense:
        if linear not in taken:
            found[linear] = _dense(read[linear][-1], accept, features)
    chosen = [found[n] for n in linears if n in found]
    served = {n.name for n in taken}
    cores = [c for c in chosen if isinstance(c, Core)]
    refused = [c for c in chosen if isinstance(c, Refusal) and c.node not in served]
    return cores, told + refused + left_out(cores, read, accept, features)


def _factors_of_codes(
    linears: list[fx.Node], accept: Accept, features: Collection[str],
    found: dict[fx.Node, Core | Refusal], taken: set[fx.Node],
) -> list[Refusal]:  # fmt: skip
    """Find pairs of linears that are one whose weight is a product of two factors of codes; why
    others stay two."""
    told = []
    for linear in linears if "coded" in features else ():
        try:
            core = read_coded_factors(linear) if linear not in taken else None
        except Unfit as why:
            told.append(refusal(linear, why.reason, why.predicate))
            continue
        if core is None or taken & core.nodes:
            continue
        if (answer := accept(core.problem)) is None:
            found[linear] = core
            _take(core, taken)
        else:
            text = f"the linear that makes its input is not fused with it: {answer}"
            told.append(refusal(linear, text, "kernel"))
    return told


def _take(answer: Core | Refusal, taken: set[fx.Node]) -> None:
    if isinstance(answer, Core):
        taken |= {n for n in answer.nodes if is_op(n, LINEAR)}


def plain(problem: Problem) -> bool:
    """Whether a weight is stored as it was captured."""
    return problem.weights == "dense" and not (problem.m or problem.bitmap or problem.sparse)


def _dense(core: Core, accept: Accept, features: Collection[str]) -> Core | Refusal:
    if "dense" not in features:
        return refusal(core.linear, DENSE, "decoded")
    return best([core], accept, features)


def best(cores: list[Core], accept: Accept, features: Collection[str]) -> Core | Refusal:
    """The first of a linear's readings that has a kernel, or why the least has none."""
    why = ""
    for core in cores:
        missing = next((what for what in needs(core.problem) if what not in features), None)
        if missing is None:
            before = read_before(core.reads)[:1] if core.rounding is not None else []
            why = accept(Unit((core,), tuple(before)).problem) or ""
            if not why:
                return core
        elif core is cores[-1]:
            why = f"the target has no kernel for {missing} weights"
    return refusal(cores[-1].linear, why, "kernel")


def needs(problem: Problem) -> list[str]:
    """Features that a target must name for a problem."""
    special: dict[str, object] = {
        "rank": problem.rank and problem.weights != "factors", "outliers": problem.outliers,
        "rounds": problem.outliers, "sparse": problem.sparse, "out_mixed": problem.out_mixed,
    }  # fmt: skip
    kind = "masked" if problem.m or problem.bitmap else "dense"
    kind = kind if problem.weights == "dense" else problem.weights
    special[kind] = kind != "int"
    return [name for name, there in special.items() if there]


# ** sparse entries **


def part_sparse(program: Program, accept: Accept, features: Collection[str]) -> None:
    """linear(x, W + S) -> csr_linear(linear(x, W), x, S) where the kernel takes W but not S.

    A sum behind the linear stays with it: csr_linear adds to whatever it is given.
    """
    for linear in list(program.calls(LINEAR)):
        side = linear.args[1]
        if not isinstance(side, fx.Node) or not is_op(side, "llmc.add_csr"):
            continue
        try:
            cores = read_core(program, linear)
        except Unfit:
            continue
        if isinstance(best(cores, accept, features), Core):
            continue
        without = [replace(c, problem=replace(c.problem, sparse=False)) for c in cores]
        if isinstance(best(without, accept, features), Core):
            _part(program, linear, side, cores[0].result)


def _part(program: Program, linear: fx.Node, side: fx.Node, result: fx.Node) -> None:
    base = side.args[0]
    assert isinstance(base, fx.Node)
    behind = only_user(result)
    if behind is not None and is_sum(behind):
        result = behind
    linear.replace_input_with(side, base)
    made = program.emit(
        "llmc.csr_linear", result, linear.args[0], *side.args[1:],
        before=result.next, made_by=MAKER, like=linear,
    )  # fmt: skip
    result.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    program.prune(side)
