"""rotate: turn the residual stream and the values of attention, so that no channel stands out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compiler.analysis.turning import Fold, Side, TurnSite, turn_sites
from ..compiler.ir.errors import ModelError, UsageError
from ..compiler.ir.graph import Param, Program
from ..compiler.ir.ops.rotation import mixed_by
from ..compiler.ir.refusal import Refusal
from ..compiler.ir.turned import Centre, Gain, Product, Rotation, Step, TurnedWeights
from ..compiler.pipeline.analysis import Analysis
from ..compiler.pipeline.base import Exact, Example, Precondition, knob
from ..compiler.pipeline.compensate import Bias, add_bias, free_name
from ..compiler.pipeline.rotating import FACT, ROTATE, signs
from ..compiler.pipeline.structure import Choice, Structural

KINDS = ("stream", "values")


def turnable(analysis: Analysis) -> Iterator[TurnSite | Refusal]:
    """Pattern: channels that an orthogonal map may turn without anything noticing."""
    yield from turn_sites(analysis.program, analysis.groups)


def _mixable(made: Any, site: TurnSite) -> str | None:
    try:
        mixed_by(site.width)
    except ModelError as e:
        return e.message
    return None


@dataclass(frozen=True)
class Rotate(Structural):
    """x → Q x in the residual stream and in each value head, Q random signs and a Hadamard matrix.

    What writes the channels gets Q W and Q b, what reads them W Qᵀ; the gains of norms go into
    their readers first, and a LayerNorm becomes an RMSNorm of a stream without a mean. A table that
    the head reads too stays: the stream is turned behind it and turned back in front of the head.
    """

    variants = {"rotate": {}}
    stage = "rotate"
    effect = Exact(rtol=1e-4)
    source = "QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024"
    pattern = turnable
    preconditions = (Precondition("mixable", _mixable),)
    hits = (
        Example("llama_gqa"), Example("layer_norm"), Example("one_plus_gain"),
        Example("tied_head"), Example("moe"),
    )  # fmt: skip
    misses = (Example("norm_feeds_add", "gain_folds"),)

    units: str = knob("stream+values", "what is turned, joined by +")
    seed: int = knob(0, "of the signs", lo=0, hi=2**31 - 1)
    store: str = knob(
        "f32",
        "what is turned and stays dense is stored in f32, or in the same type as before, rounded",
        choices=("f32", "same"),
    )

    def check(self) -> None:
        unknown = [u for u in self.units.split("+") if u not in KINDS]
        if unknown:
            raise UsageError(
                f"rotate:units: expected some of {', '.join(KINDS)}, found {unknown[0]!r}"
            )

    def sites(self, analysis: Analysis) -> tuple[list[Any], list[Refusal]]:
        """Channels of the kinds that were asked for."""
        found, refused = super().sites(analysis)
        return [s for s in found if s.kind in self.units.split("+")], refused

    def predict(self, analysis: Analysis, sites: list[TurnSite]) -> Choice:
        """Nothing depends on weights or data."""
        records = [
            {"site": s.id, "kind": s.kind, "channels": s.width, "parameters": len(s.sides),
             "norms": len(s.folds), "online": len(s.ahead) + len(s.back)}
            for s in sites
        ]  # fmt: skip
        return Choice({"sites": [s.id for s in sites]}, records=records)

    def apply(self, program: Program, choice: Choice) -> list[str]:
        chosen = set(choice.data["sites"])
        sites = [
            s for s in turn_sites(program) if isinstance(s, TurnSite) and s.id in chosen
        ]  # fmt: skip
        steps: dict[str, list[tuple[int, Step]]] = {}
        sides: dict[str, set[str]] = {}
        given: dict[str, str] = {}
        for site in sites:
            turn = signs(site.width, self.seed, site.id)
            for fold in site.folds:
                _fold(program, fold, steps, given)
            for s in _with_biases(site.sides, given):
                todo = steps.setdefault(s.param, [])
                if site.centred and not s.reads:
                    todo.append((1, Centre(s.axis)))
                todo.append((2, Rotation(s.axis, turn, s.index)))
                if len(program.params[s.param].shape) > 1:
                    sides.setdefault(s.param, set()).add("in" if s.reads else "out")
            self._online(program, site, turn)
        return self._store(program, steps, sides)

    def _online(self, program: Program, site: TurnSite, turn: Tensor) -> None:
        """Turn behind tables that stay, and back in front of what reads them too."""
        places = [program.node(n) for n in (*site.ahead, *site.back)]
        if not places:
            return
        first = min(places)
        name = free_name(program, "stream_signs")
        param = Param(name, tuple(turn.shape), turn.dtype, keep=True)
        scale = program.add_param(param, turn, before=first, made_by=self.called, like=first)
        for table in (program.node(n) for n in site.ahead):
            where: dict[str, Any] = {
                "before": table.next, "made_by": self.called, "like": table
            }  # fmt: skip
            users, x = list(table.users), table
            if site.centred:
                mean = program.emit("aten.mean.dim", x, [-1], True, **where)
                x = program.emit("aten.sub.Tensor", x, mean, **where)
            turned = program.emit(ROTATE, x, scale, **where)
            for user in users:
                user.replace_input_with(table, turned)
        for reader in (program.node(n) for n in site.back):
            x = reader.args[0]  # type: ignore[assignment]
            back = program.emit(
                ROTATE, x, scale, inverse=True, before=reader, made_by=self.called, like=reader
            )
            reader.args = (back, *reader.args[1:])

    def _store(
        self, program: Program, steps: dict[str, list[tuple[int, Step]]], sides: dict[str, set[str]]
    ) -> list[str]:
        """Give the program its turned parameters."""
        dtypes: dict[str, torch.dtype] = {}
        for name in steps:
            param = program.params[name]
            rounds = self.store == "same" and len(param.shape) > 1
            dtypes[name] = (
                param.dtype if rounds else torch.promote_types(param.dtype, torch.float32)
            )
            program.params[name] = replace(param, dtype=dtypes[name])
        ordered = {n: tuple(s for _, s in sorted(found, key=_when)) for n, found in steps.items()}
        program.weights = TurnedWeights(program.weights, ordered, dtypes)
        known = {n: set(s) for n, s in program.facts.get(FACT, {}).items()}
        for name, found in sides.items():
            known.setdefault(name, set()).update(found)
        program.facts[FACT] = {n: sorted(s) for n, s in known.items()}
        program.prune()
        return list(steps)


def _when(step: tuple[int, Step]) -> int:
    return step[0]


def _with_biases(sides: Iterable[Side], given: Mapping[str, str]) -> Iterator[Side]:
    """Sides, and those of biases that were given to their matrices since they were found."""
    for side in sides:
        yield side
        if side.axis == 0 and not side.reads and side.param in given:
            yield replace(side, param=given[side.param])


def _fold(
    program: Program, fold: Fold, steps: dict[str, list[tuple[int, Step]]], given: dict[str, str]
) -> None:
    """Take a norm's gain and bias into its readers; a layer_norm becomes an rms_norm.

    given: gets the name of the new bias of each weight that had none.
    """
    norm = program.node(fold.node)
    for call, weight, axis, bias in fold.readers:
        if fold.gain is not None:
            steps.setdefault(weight, []).append((0, Gain(axis, fold.gain, fold.offset)))
        if fold.bias is not None:
            if bias is None:
                given[weight] = bias = free_name(program, f"{weight}_bias")
                param = program.params[weight]
                dtype = torch.promote_types(param.dtype, torch.float32)
                zeros = torch.zeros(param.shape[0], dtype=dtype)
                add_bias(program, Bias(call, bias, weight, True), zeros)
            steps.setdefault(bias, []).append((0, Product(weight, fold.bias)))
    new = program.emit(
        "llmc.rms_norm", norm.args[0], eps=norm.kwargs["eps"], before=norm, made_by="rotate",
        like=norm,
    )  # fmt: skip
    norm.replace_all_uses_with(new)
