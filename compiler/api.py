"""The Python door: capture, plan, compile, load, and the model that comes out.

    small = llmc.compile(model, passes="smooth,w4,prune24", calibration=texts)
    logits = small(input_ids)

The given model is never changed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .ir.errors import GateError, UsageError, nearest
from .ir.events import Event, Listener, silent, tell
from .ir.graph import Program
from .model import Model, Resident
from .pipeline.candidates import tabulate
from .pipeline.compile import Compiled, compile_plan
from .pipeline.data import Calibration, Source, Tokenizer, held_out
from .pipeline.data import calibration as draw
from .pipeline.measure import Options
from .pipeline.mixing import Mixture, Slices, check_sensitivity
from .pipeline.mixing import mix as run_mix
from .pipeline.plan import Plan, make_plan
from .pipeline.recipe import Recipe, from_file, from_mapping, from_strings
from .pipeline.target import Target, read_target
from .pipeline.trace import tracing

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Model", "Settings", "capture", "compile", "load", "plan"]

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
ModelSource = "str | Path | torch.nn.Module | Program"


@dataclass(frozen=True)
class Settings:
    """How calibration is drawn and run; all of it is recorded in the artefact.

    Attributes:
        samples: windows of text; length: tokens per window, None for min(2048, the context).
        seed: of the windows' offsets.
        propagate: what feeds the next block: ``compressed`` or ``dense`` outputs.
        true_sequential: solve a block in waves, each seeing its compressed predecessors.
        batch: windows that run at once.
        budget: bytes for the Hessians of one wave.
        device: where blocks run and are solved.
    """

    samples: int = DEFAULT_SAMPLES
    length: int | None = None
    seed: int = 0
    propagate: str = "compressed"
    true_sequential: bool = False
    batch: int = 8
    budget: int = 4 << 30
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("batch", 1), ("budget", 1), ("seed", 0)):
            found = getattr(self, name)
            if found < least:
                raise UsageError(f"{name}: expected at least {least}, found {found}")
        if self.length is not None and self.length < 2:
            raise UsageError(f"length: expected at least 2, found {self.length}")

    def for_program(self, program: Program) -> Settings:
        """The same with ``length`` filled in.

        Raises:
            UsageError: a length beyond the model's context.
        """
        context = program.facts.get("context")
        if self.length is not None:
            if isinstance(context, int) and self.length > context:
                raise UsageError(
                    f"length: expected at most {context}, the model's context, found {self.length}"
                )
            return self
        length = min(DEFAULT_LENGTH, context) if isinstance(context, int) else DEFAULT_LENGTH
        return replace(self, length=length)

    @property
    def options(self) -> Options:
        return Options(self.batch, self.propagate, self.true_sequential, self.budget, self.device)


def capture(
    source: Any, *, inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | None = None,
    trust_remote_code: bool = False,
) -> Program:  # fmt: skip
    """A model as a program: graph, parameters (lazy) and facts.

    Args:
        inputs: example inputs, for a module that is not of transformers.
        source: a model folder, a hub id, an ``nn.Module``, or a program (returned as it is).
    Raises:
        ModelError, CaptureError: no such model, a checkpoint that is not sound, or a model that
            cannot be expressed without guessing.
    """
    if isinstance(source, Program):
        return source
    from .capture import capture as door

    program = door(source, inputs=inputs, trust_remote_code=trust_remote_code)
    tell(Event("captured", {"nodes": len(program.graph.nodes), "params": len(program.params)}))
    return program


def read_recipe(
    passes: str | Sequence[str] | None, recipe: str | Path | Mapping[str, Any] | Recipe | None
) -> Recipe:
    """The recipe that was asked for: pass strings (several are barriers), a YAML file or a mapping.

    Raises:
        UsageError: neither or both are given, or one is wrong; the field is named.
    """
    if (passes is None) == (recipe is None):
        found = "neither" if passes is None else "both"
        raise UsageError(f"expected passes or a recipe, found {found}", hint="see: llmc passes")
    if passes is not None:
        return from_strings([passes] if isinstance(passes, str) else list(passes))
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, Path)):
        return from_file(recipe)
    assert recipe is not None
    return from_mapping(recipe)


def plan(
    source: Any,
    passes: str | Sequence[str] | None = None,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What compiling would do: sites, schemes, bytes, refusals and the order. Loads no weight.

    Raises:
        UsageError: a wrong recipe. ModelError: a wrong model. GateError: no place for any pass.
    """
    wanted = read_recipe(passes, recipe)
    return make_plan(capture(source, inputs=inputs, trust_remote_code=trust_remote_code), wanted)


def compile(
    source: Any,
    passes: str | Sequence[str] | None = None,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    calibration: Source = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    propagate: str = "compressed",
    true_sequential: bool = False,
    batch: int = 8,
    budget_ram: int = 4 << 30,
    bits: float | None = None,
    size: str | None = None,
    budget: str | None = None,
    candidates: str | None = None,
    sensitivity: str = "auto",
    target: str = "reference",
    tokenizer: str | Path | Tokenizer | None = None,
    inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | None = None,
    strict: bool = False,
    trust_remote_code: bool = False,
    progress: Listener | None = None,
    trace: str | Path | None = None,
) -> Model:
    """Compress a model; the given one is not touched.

    Args:
        source: a model folder, a hub id, an ``nn.Module`` or a captured program.
        passes: ``"smooth,w4:group=64,prune24"``; a list of strings has barriers between them.
        recipe: instead of ``passes``, a YAML file or a mapping of its shape.
        calibration: a path (.txt, .jsonl, .npy, .safetensors), texts, int64 tokens [n] or
            [samples, length], or None for the built-in corpus.
        samples: windows, 128 by default (a tensor [samples, length] says it itself).
        length: tokens per window; by default min(2048, the model's context).
        budget_ram: bytes for the Hessians of one wave.
        bits, size, budget: choose a grid for each group of weights: so many stored bits per weight
            (4.25), a share of the model (``"60%"``) or a perplexity (``"ppl+2%"``); one of them.
        candidates: grids to choose from, ``"w3,w4,nf4,dense"``; else the widths of the recipe's.
        sensitivity: what predicts losses: ``auto``, ``proxy``, ``fisher`` or ``loss``.
        target: what the result is lowered for: ``reference``, ``cpu`` or ``triton``.
        tokenizer: a folder with tokenizer.json, for a module that does not know its own.
        inputs: example inputs, for a module that is not of transformers; such a module takes passes
            that need no calibration.
        strict: a solve that fell back is an error.
        progress: called with each :class:`~llmc.compiler.ir.events.Event`.
        trace: a folder for graphs and events (see :mod:`.pipeline.trace`), by default LLMC_TRACE's.
    Raises:
        UsageError, ModelError, CaptureError: wrong input. GateError: nothing to do, or ``strict``.
    """
    wanted = read_recipe(passes, recipe)
    check_target(target)
    aim = read_target(bits, size, budget)
    check_sensitivity(sensitivity)
    if isinstance(calibration, torch.Tensor) and calibration.dim() == 2:
        samples = calibration.shape[0] if samples is None else samples
        length = calibration.shape[1] if length is None else length
    settings = Settings(
        DEFAULT_SAMPLES if samples is None else samples, length, seed, propagate,
        true_sequential, batch, budget_ram,
    )  # fmt: skip
    with tracing(trace):
        program = capture(source, inputs=inputs, trust_remote_code=trust_remote_code)
        settings = settings.for_program(program)
        own = find_tokenizer(source, program, tokenizer)
        mixture = None
        if aim is not None:
            mixture = mix(
                program, wanted, aim, calibration, own, settings, candidates=candidates,
                sensitivity=sensitivity, listener=progress or silent,
            )  # fmt: skip
        planned = make_plan(program, wanted) if mixture is None else mixture.plan(program)
        data = calibrate(planned, calibration, own, settings)
        return carry_out(
            planned, data, settings, tokenizer=own, target=target, strict=strict,
            listener=progress or silent,
        )  # fmt: skip


def check_target(name: str) -> None:
    """Raises UsageError for an unknown target, the nearest named."""
    from ..codegen.targets import TARGETS

    if name not in TARGETS:
        raise UsageError(
            f"target: expected one of {', '.join(TARGETS)}, found {name!r}",
            hint=nearest(name, TARGETS),
        )


def needs_data(planned: Plan) -> bool:
    """Whether any pass of the plan asks for calibration data."""
    return bool(planned.needing)


def calibrate(
    planned: Plan, source: Source, tokenizer: Tokenizer | None, settings: Settings
) -> Calibration | None:
    """Calibration windows for a plan, None where no pass needs any.

    Raises:
        UsageError: data that is too short or cannot be read, or tokens outside the vocabulary.
    """
    if not needs_data(planned):
        return None
    return _drawn(planned.source, source, tokenizer, settings)


def _drawn(
    program: Program, source: Source, tokenizer: Tokenizer | None, settings: Settings
) -> Calibration:
    assert settings.length is not None
    data = draw(source, tokenizer, settings.samples, settings.length, settings.seed)
    vocab, top = program.facts.get("vocab"), int(data.tokens.max())
    if isinstance(vocab, int) and top >= vocab:
        raise UsageError(
            f"calibration: expected tokens below {vocab}, found {top}",
            hint="was the text tokenised with another tokenizer?",
        )
    return data


def mix(
    program: Program,
    recipe: Recipe,
    target: Target,
    source: Source,
    tokenizer: Tokenizer | None,
    settings: Settings,
    *,
    candidates: str | None = None,
    sensitivity: str = "auto",
    listener: Listener = silent,
) -> Mixture:
    """Choose a grid for each group of weights, on calibration text (see :mod:`.pipeline.mixing`).

    Raises:
        UsageError: a target out of range, a recipe without a grid or with structural passes, or
            wrong candidates. GateError: a perplexity that no choice reaches.
    """
    table = tabulate(program, recipe, candidates, f"--{target.kind}")
    if target.kind != "budget":
        target.bytes(table)
    data = _drawn(program, source, tokenizer, settings)
    tokens, held = held_out(source, tokenizer, data, max(1, settings.samples // 2))
    slices = Slices(tokens, held.tokens, held.record)
    return run_mix(program, table, target, slices, settings.options, sensitivity, listener)


def carry_out(
    planned: Plan,
    data: Calibration | None,
    settings: Settings,
    *,
    tokenizer: Tokenizer | None = None,
    target: str = "reference",
    strict: bool = False,
    listener: Listener = silent,
) -> Model:
    """Solve a plan on calibration windows and make the model.

    Raises:
        ModelError: a weight or an activation is not finite. GateError: ``strict`` and a fallback.
    """
    began = time.perf_counter()
    tokens = None if data is None else data.tokens
    done = compile_plan(planned, tokens, settings.options, listener)
    if strict and done.fallbacks:
        first = done.fallbacks[0]
        raise GateError(
            f"expected every solve to succeed, found {len(done.fallbacks)} that fell back",
            where=first["site"], hint=first["reasons"][0],
        )  # fmt: skip
    return Model(
        done.program, done, run_record(done, data, settings), tokenizer, target,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def run_record(done: Compiled, data: Calibration | None, settings: Settings) -> dict[str, Any]:
    """What decided the result, for the manifest: recipe, data, settings."""
    kept = asdict(settings)
    # Where and in how large pieces it ran does not belong to what the result is.
    for name in ("samples", "length", "seed", "device"):
        kept.pop(name)
    return {
        "recipe": done.plan.recipe.to_json(),
        "passes": done.plan.recipe.text(),
        "calibration": None if data is None else data.record,
        "settings": kept,
        **({} if done.plan.mixing is None else {"mixed": done.plan.mixing}),
    }


def find_tokenizer(
    source: Any, program: Program, given: str | Path | Tokenizer | None = None
) -> Tokenizer | None:
    """The tokenizer that was given, else the model folder's own, else none."""
    if isinstance(given, Tokenizer):
        return given
    if given is not None:
        return Tokenizer(given)
    named = getattr(source, "name_or_path", None)
    for folder in (program.facts.get("tokenizer"), source, named):
        if isinstance(folder, (str, Path)) and str(folder):
            path = Path(folder).expanduser()
            if (path / "tokenizer.json").is_file():
                return Tokenizer(path)
    return None


def load(
    path: str | Path, *, target: str = "reference", dtype: torch.dtype | None = None,
    resident: Resident = "packed", compiled: bool = False,
) -> Model:  # fmt: skip
    """An artefact, ready to run; nothing in it is executed and transformers is not needed.

    Args:
        target: ``reference``, ``cpu`` or ``triton``; dtype: in which to compute, fp32 by default.
        resident, compiled: see :class:`Model`; ``dense`` takes memory.
    Raises:
        ModelError: not an artefact, or one that is damaged; the file and the fault are named.
    """
    check_target(target)
    return Model.load(path, target=target, dtype=dtype, resident=resident, compiled=compiled)


def open_any(
    path: str | Path, *, target: str = "reference", dtype: torch.dtype | None = None,
    resident: Resident = "packed", trust_remote_code: bool = False, compiled: bool = False,
) -> Model:  # fmt: skip
    """An artefact, or a model folder or hub id as it is: codes stay codes.

    Raises: ModelError: neither.
    """
    from .runtime import artefact, imported

    if artefact.is_artefact(path):
        return load(path, target=target, dtype=dtype, resident=resident, compiled=compiled)
    program = capture(path, trust_remote_code=trust_remote_code)
    own, loaded = find_tokenizer(path, program), imported.imported(program, Path(path))
    record = {"passes": "dense"} if loaded is None else loaded.report["record"]
    return Model(program, None, record, own, target, dtype=dtype, resident=resident, loaded=loaded)
