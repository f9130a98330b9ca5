"""Channel-scale migration: where x -> x/s per channel can be undone upstream, exactly.

For every value that linears read, the readers' input columns are multiplied by s and the division
is absorbed by what made the value: a norm's gain, the linear factor of a gated product, the value
path of an attention (heads that share a KV head share their scales), the rows of a linear, behind a
relu too. Each value on the way must be read by rewritten nodes alone, each rewritten parameter by
its one node. Sources: SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) for the edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..ir.graph import Program, info
from ..ir.refusal import Refusal
from .absorb import Absorber, Builder, No, argument
from .blocks import segments_of
from .flow import EXPERTS, LINEAR, is_plain_move, origin
from .linears import sole_param
from .patterns import last_axis, pull_back
from .ties import as_int, op_name


@dataclass(frozen=True, eq=False)
class MigrationSite:
    """One edge across which per-channel scales can move without changing the model.

    Attributes:
        id: ``<segment>/<kind><i>``.
        kind: norm, product, value or linear: what absorbs the division.
        value: name of the value that the first consumer reads; it becomes value / s[expand].
        channels: length of its last axis.
        n_scales: how many scales are free; below ``channels`` where some must be equal.
        expand: int64 [channels], the scale of each channel.
        consumers: (node, parameter, axis): its axis of ``channels`` is multiplied by s[expand].
        absorbers: what is divided, see :class:`~.absorb.Absorber`.
        segment: of the first consumer.
    """

    id: str
    kind: str
    value: str
    channels: int
    n_scales: int
    expand: torch.Tensor
    consumers: tuple[tuple[str, str, int], ...]
    absorbers: tuple[Absorber, ...]
    segment: str


def migration_sites(program: Program) -> list[MigrationSite | Refusal]:
    """Sites and refusals in graph order, one for each distinct value that weights read."""
    out: list[MigrationSite | Refusal] = []
    place = {n: s.name for s in segments_of(program) for n in s.nodes}
    by_name = {n.name: n for n in program.graph.nodes}
    done: set[fx.Node] = set()
    counts: dict[str, int] = {}
    for segment in segments_of(program):
        for name in segment.nodes:
            node = by_name[name]
            if op_name(node) not in (LINEAR, EXPERTS) or not isinstance(node.args[0], fx.Node):
                continue
            root = origin(node.args[0], is_plain_move)
            if root not in done and root.op == "call_function":
                done.add(root)
                try:
                    site = _site(program, root, counts, place)
                except No as no:
                    out.append(_refusal(root, no))
                else:
                    out.append(site)
            if op_name(node) == EXPERTS:
                reason = "the product inside an experts node is no value of the graph"
                out.append(_refusal(node, No("product_is_value", reason, node)))
    return out


def _refusal(root: fx.Node, no: No) -> Refusal:
    reason = f"{root.name} cannot be rescaled: {no.reason}"
    return Refusal("migrate", no.node.name, reason, no.predicate, info(no.node).path)


def _readers(root: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(consumer, value it reads) of a value through moves.

    Raises:
        No: somebody else reads it too.
    """
    found, todo = [], [root]
    for value in todo:
        for user in value.users:
            takes = [i for i, a in enumerate(user.args) if a is value]
            if op_name(user) in (LINEAR, EXPERTS) and takes == [0]:
                found.append((user, value))
            elif is_plain_move(user) and takes == [0]:
                todo.append(user)
            else:
                raise No(
                    "all_users_rewritten",
                    f"{user.name} ({op_name(user) or user.op}) reads it too",
                    user,
                )
    return found


def _site(
    program: Program, root: fx.Node, counts: dict[str, int], place: dict[str, str]
) -> MigrationSite:
    consumers = []
    agreed: torch.Tensor | None = None
    readers = _readers(root)
    for node, value in readers:
        which, axis = (1, 1) if op_name(node) == LINEAR else (3, 2)
        param = sole_param(program, node.args[which], node)
        if isinstance(param, tuple):
            raise No(param[0], param[1], program.node(param[2]))
        consumers.append((node.name, param.name, axis))
        pattern = _at_root(root, value)
        if agreed is not None and not torch.equal(agreed, pattern):
            raise No("consumers_agree", f"{node.name} reads its channels in another layout", node)
        agreed = pattern
    assert agreed is not None
    first = readers[0][1]
    segment = place[readers[0][0].name]
    channels = as_int(info(first).type.shape[-1])  # type: ignore[union-attr]
    assert channels is not None
    builder = Builder(program, channels)
    builder.absorb(root, agreed)
    n_scales, absorbers, expand = builder.finish()
    for a in absorbers:
        # Calibration is done with an earlier segment: its outputs could not follow the division.
        home = place[program.param_node(a.param).name]
        if home != segment:
            raise No("within_segment", f"{a.param} would take the division in {home}", root)
    kind = builder.kind or "linear"
    stem = f"{segment}/{'rows' if kind == 'linear' else kind}"
    counts[stem] = counts.get(stem, -1) + 1
    return MigrationSite(
        f"{stem}{counts[stem]}", kind, first.name, channels, n_scales, expand,
        tuple(consumers), absorbers, segment,
    )  # fmt: skip


def _at_root(root: fx.Node, value: fx.Node) -> torch.Tensor:
    """The pattern at the root when each channel of ``value`` has a scale of its own."""
    pattern = last_axis(value)
    while pattern is not None and value is not root:
        back = pull_back(value, pattern)
        if back is None:
            raise No("moves_followed", f"{value.name} moves channels untracked", value)
        value, pattern = back[0].node, back[1]
    if pattern is None:
        raise No("channels_known", f"{value.name} has a symbolic number of channels", value)
    return pattern


def shift_biases(
    program: Program, site: MigrationSite
) -> tuple[str, dict[str, str | None]] | tuple[None, str]:
    """Where a shift of the site's value would go: x becomes x - z, the readers' biases + W·z.

    Returns:
        (the norm's bias, by reader the name of its bias, None where it has none), or (None, why
        the value cannot be shifted).
    """
    root = origin(program.node(site.value), is_plain_move)
    if op_name(root) != "llmc.layer_norm":
        return None, f"{root.name} ({op_name(root)}) has no bias that could take a shift"
    bias = program.param_of(argument(root, 2, "bias"))
    if bias is None or bias.name not in {a.param for a in site.absorbers}:
        return None, f"{root.name} has no bias of its own"
    found: dict[str, str | None] = {}
    for name, _, _ in site.consumers:
        node = program.node(name)
        if op_name(node) != LINEAR:
            return None, f"{name} is no linear with a bias"
        old = argument(node, 2, "bias")
        own = sole_param(program, old, node) if old is not None else None
        if isinstance(own, tuple):
            return None, f"the bias of {name} cannot change: {own[1]}"
        found[name] = None if own is None else own.name
    return bias.name, found


def shift_ready(program: Program, site: MigrationSite) -> bool:
    """Whether the value can be shifted and every reader has the bias for it."""
    norm, found = shift_biases(program, site)
    return norm is not None and isinstance(found, dict) and None not in found.values()


def shifted(program: Program, site: MigrationSite, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    """New tensors, by parameter name, after ``shift`` is taken off the site's value.

    Args:
        shift: [n_scales]. Every reader must have a bias (see `shift_biases`).
    Raises:
        ModelError: a parameter's tensor cannot be loaded.
    """
    norm, biases = shift_biases(program, site)
    assert norm is not None
    assert isinstance(biases, dict)
    wide = torch.promote_types(torch.float32, shift.dtype)
    shift = shift.to(wide)
    index = next(a.index for a in site.absorbers if a.param == norm)
    out = {norm: program.weights.load(norm).to(wide) - shift[index]}
    for name, param, _ in site.consumers:
        bias = biases[name]
        assert bias is not None
        weight = program.weights.load(param).to(wide)
        out[bias] = program.weights.load(bias).to(wide) + weight @ shift[site.expand]
    return out


def migrated(
    program: Program, site: MigrationSite, scales: torch.Tensor
) -> dict[str, torch.Tensor]:
    """New tensors, by parameter name, after dividing the site's value by ``scales`` per channel.

    Args:
        scales: [n_scales], positive. Everything is computed in fp32, or in fp64 where scales are.
    Raises:
        ModelError: a parameter's tensor cannot be loaded.
    """
    out: dict[str, torch.Tensor] = {}
    wide = torch.promote_types(torch.float32, scales.dtype)
    scales = scales.to(wide)

    def along(tensor: torch.Tensor, axis: int, factor: torch.Tensor) -> torch.Tensor:
        return factor.reshape([-1 if a == axis else 1 for a in range(tensor.dim())])

    for _, name, axis in site.consumers:
        t = out[name] if name in out else program.weights.load(name).to(wide)
        out[name] = t * along(t, axis, scales[site.expand])
    for a in site.absorbers:
        t = out[a.param] if a.param in out else program.weights.load(a.param).to(wide)
        factor = torch.where(a.index >= 0, scales[a.index.clamp_min(0)] ** a.power, 1.0)
        out[a.param] = (t + a.offset) * along(t, a.axis, factor) - a.offset
    return out
