"""llmc as a backend of torch.compile: ``torch.compile(model, backend="llmc", options={...})``.

Each graph that Dynamo hands over is captured, planned, solved and lowered like any other model.
What was solved is kept by parameter identity, so a recompile for other shapes reuses the same
codes. Only passes that keep the graph's interface run here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from .api import Settings, calibrate, read_recipe
from .borrow import fill_from_artefact, own_params
from .ir.errors import UsageError, nearest
from .ir.graph import Program, info, tensor_type
from .ir.ops import row_of
from .ir.types import TensorType, same_type
from .model import fold_params
from .pipeline.compile import compile_plan
from .pipeline.data import Source, Tokenizer
from .pipeline.encode import refresh_types
from .pipeline.order import LATE
from .pipeline.plan import Plan, make_plan
from .pipeline.recipe import Recipe
from .pipeline.structure import Structural
from .pipeline.trace import tracing

_SETTINGS = ("samples", "length", "seed", "batch", "propagate", "true_sequential", "budget")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
OPTIONS = ("passes", "recipe", "calibration", "artifact", "tokenizer", "target", "mode", *_SETTINGS)


@dataclass(frozen=True)
class Options:
    """The ``options`` of torch.compile, checked.

    Attributes:
        recipe: from ``passes`` or ``recipe``, or the artefact's own.
        calibration: texts, tokens or a path; ``artifact``: a folder made by ``llmc compile``.
        target: ``reference``, ``cpu`` or ``triton``; by default triton on CUDA, else reference.
        mode: of :data:`MODES`: what is no kernel of ours is compiled by Inductor around them.
    """

    recipe: Recipe
    calibration: Source = None
    artifact: Path | None = None
    tokenizer: Tokenizer | None = None
    target: str | None = None
    mode: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What decides the codes, as text: recompiles with the same key share them."""
        data: Any = self.calibration
        if isinstance(data, torch.Tensor):
            data = (tuple(data.shape), hash(data.detach().cpu().numpy().tobytes()))
        overrides = self.recipe.to_json()["overrides"]
        return repr((self.recipe.text(), overrides, data, str(self.artifact), self.settings))


def read_options(given: Mapping[str, Any] | None) -> Options:
    """Check the options.

    Raises:
        UsageError: an unknown option (the nearest is named), nothing to do, or two data sources.
    """
    given = dict(given or {})
    for name in given:
        if name not in OPTIONS:
            raise UsageError(
                f"options: expected one of {', '.join(OPTIONS)}, found {name!r}",
                hint=nearest(name, OPTIONS),
            )
    artifact = given.get("artifact")
    passes, recipe = given.get("passes"), given.get("recipe")
    if artifact is not None:
        if any(given.get(k) is not None for k in ("passes", "recipe", "calibration")):
            raise UsageError("options: expected artifact alone, found passes or calibration too")
        wanted = _artefact_recipe(Path(artifact))
    else:
        wanted = read_recipe(passes, recipe)
    for call in wanted.calls:
        if isinstance(call.made, Structural):
            leaves = call.made.stage in LATE
            what = "run the graph as a whole" if leaves else "keep every shape"
            raise UsageError(
                f"options: expected passes that {what}, found {call.name!r}",
                hint="llmc compile runs every pass",
            )
    tokenizer = given.get("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer(tokenizer)
    mode = given.get("mode")
    if mode is not None and mode not in MODES:
        raise UsageError(
            f"mode: expected one of {', '.join(MODES)}, found {mode!r}",
            hint=nearest(str(mode), MODES),
        )
    return Options(
        wanted, given.get("calibration"), None if artifact is None else Path(artifact), tokenizer,
        given.get("target"), mode, {k: given[k] for k in _SETTINGS if k in given},
    )  # fmt: skip


def _artefact_recipe(folder: Path) -> Recipe:
    """The recipe that an artefact was made by."""
    from .runtime.artefact import load

    found = load(folder, verify=False)
    passes: list[list[str]] = []
    for row in found.manifest.passes:
        while len(passes) <= row["stage"]:
            passes.append([])
        knobs = ",".join(f"{k}={_word(v)}" for k, v in row["given"].items())
        passes[row["stage"]].append(row["pass"] + (f":{knobs}" if knobs else ""))
    if found.plan["recipe"]["overrides"]:
        raise UsageError("artifact: expected a recipe without overrides, found some; not built yet")
    return read_recipe([",".join(stage) for stage in passes], None)


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


# What was solved, by parameter object: (its version when solved, key of the options, tensors).
_SOLVED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class _Kept:
    version: int
    key: str
    tensors: dict[str, torch.Tensor]


def llmc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph.

    Args:
        options: see :class:`Options` and :data:`OPTIONS`.
        mode: must stay unset, as torch takes it or options; ``options`` have one of their own.
    Returns:
        A callable with the graph's own inputs and outputs. ``llmc_program`` is its program.
    Raises:
        UsageError: wrong options; a pass that needs statistics without ``calibration`` or
            ``artifact``; a pass that changes the interface. CaptureError: a graph that requires
            grad, or that cannot be captured.
    """
    if mode is not None:
        raise UsageError(
            f"expected no mode for backend llmc, found {mode!r}",
            hint=f"pass options={{..., 'mode': {mode!r}}}",
        )
    wanted = read_options(options)
    with tracing():
        return _compiled(gm, example_inputs, wanted)


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], wanted: Options
) -> Callable[..., Any]:
    from .capture.module import capture_dynamo

    found = capture_dynamo(gm, example_inputs)
    program = found.program
    device = _device(example_inputs)
    if _linears(program) == 0:
        return _callable(program, found.order, "reference", device, wanted.mode)
    names = _name_inputs(program)
    order = [names.get(n, n) if n is not None else None for n in found.order]
    plan = make_plan(program, wanted.recipe)
    _same_interface(plan)
    reached = _reached(plan)
    if not _reuse(plan, reached, found.sources, wanted.key):
        if wanted.artifact is not None:
            fill_from_artefact(plan, wanted.artifact)
        else:
            _solve(plan, wanted, device)
        _keep(plan, reached, found.sources, wanted.key)
    return _callable(plan.program, order, wanted.target or _target(device), device, wanted.mode)


def compressed(module: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """What the backend holds for a module's parameters: stored tensors by parameter name and part.

    The part is ``codes``, ``scale``, ``meta`` and so on, empty for a parameter that only moved.
    """
    out: dict[str, dict[str, torch.Tensor]] = {}
    for name, param in module.named_parameters():
        kept: _Kept | None = _SOLVED.get(param)
        if kept is not None:
            out[name] = {suffix.removeprefix("."): t for suffix, t in kept.tensors.items()}
    return out


def _device(example_inputs: Sequence[Any]) -> torch.device:
    found = {e.device for e in example_inputs if isinstance(e, torch.Tensor)} or {
        torch.device("cpu")
    }
    if len(found) > 1:
        raise UsageError(f"expected one device, found {sorted(map(str, found))}")
    return found.pop()


def _target(device: torch.device) -> str:
    """The fastest target that runs on a device; a warning says why it is not the kernels."""
    if device.type != "cuda":
        return "reference"
    from ..codegen.device import unavailable

    why = unavailable(device)
    if why is None:
        return "triton"
    warnings.warn(f"llmc runs the reference, not its kernels: {why}", stacklevel=2)
    return "reference"


def _linears(program: Program) -> int:
    return sum(1 for _ in program.calls("aten.linear.default"))


def _name_inputs(program: Program) -> dict[str, str]:
    """Call the one integer [B, S] input that an embedding reads ``input_ids``; old to new name."""
    ids = [
        n for n in program.inputs
        if isinstance(info(n).type, TensorType)
        and tensor_type(n).dtype == torch.int64
        and tensor_type(n).rank == 2
        and any(u.op == "call_function" and row_of(u).name == "aten.embedding.default"
                and u.args[1] is n for u in n.users)
    ]  # fmt: skip
    if len(ids) != 1:
        return {}
    old = ids[0].name
    ids[0].target = "input_ids"
    ids[0]._rename("input_ids")
    return {old: ids[0].name}


def _same_interface(plan: Plan) -> None:
    """Raises UsageError when a pass changed the graph's inputs or outputs."""
    sides = []
    for p in (plan.source, plan.program):
        sides.append([*(info(n).type for n in p.inputs), info(p.output).type])
    if len(sides[0]) != len(sides[1]) or not all(
        same_type(a, b) for a, b in zip(*sides, strict=True)
    ):
        raise UsageError(
            f"expected passes that keep the graph's inputs and outputs, found {plan.recipe.text()}",
            hint="llmc compile runs every pass",
        )


def _reached(plan: Plan) -> list[str]:
    """Parameters of the source that the plan rewrites, in the order of its sites."""
    out: dict[str, None] = {}
    for stage in plan.stages:
        for m in stage.migrations:
            out |= dict.fromkeys(fold_params(m, plan.source))
        out |= dict.fromkeys(d.site.param for d in stage.decisions.values())
    return list(out)


def _reuse(plan: Plan, reached: list[str], sources: Mapping[str, torch.Tensor], key: str) -> bool:
    """Fill the plan from what was solved for these very parameters; False when nothing was.

    Raises:
        UsageError: only some of them were: another graph shares weights with this one.
    """
    kept: dict[str, _Kept | None] = {}
    for name in reached:
        tensor = sources.get(name)
        record = None if tensor is None else _SOLVED.get(tensor)
        stamp = (None if tensor is None else tensor._version, key)
        if record is not None and (record.version, record.key) != stamp:
            return False  # changed since, or solved for other options: all anew
        kept[name] = record
    if not any(kept.values()):
        return False
    missing = [n for n, record in kept.items() if record is None]
    if missing:
        names = plan.source.params[missing[0]].names or (missing[0],)
        raise UsageError(
            f"expected a graph whose weights were all compressed together, found {names[0]} new "
            f"beside {len(kept) - len(missing)} that another graph shares",
            hint="compile the model as one graph (fullgraph=True)",
        )
    for base, record in kept.items():
        assert record is not None
        for suffix, tensor in record.tensors.items():
            plan.program.set_tensor(base + suffix, tensor)
    refresh_types(plan.program)
    return True


def _keep(plan: Plan, reached: list[str], sources: Mapping[str, torch.Tensor], key: str) -> None:
    weights = plan.program.weights
    for base in reached:
        tensor = sources.get(base)
        if tensor is not None:
            made = {n[len(base) :]: weights.load(n) for n in own_params(plan.program, base)}
            _SOLVED[tensor] = _Kept(tensor._version, key, made)


def _solve(plan: Plan, wanted: Options, device: torch.device) -> None:
    """Calibrate and solve on windows of the shape that the graph was traced for."""
    tokens = None
    if plan.needing:
        if wanted.calibration is None:
            raise UsageError(
                f"options: expected calibration or artifact for {', '.join(plan.needing)}, which "
                "need statistics, found neither",
                hint="or a solver without statistics, such as w4:solver=rtn",
            )
        settings = _fitted(plan.source, wanted)
        data = calibrate(plan, wanted.calibration, wanted.tokenizer, settings)
        tokens = None if data is None else data.tokens
    else:
        settings = Settings(**wanted.settings)
    run = settings.options
    compile_plan(plan, tokens, type(run)(**{**vars(run), "device": str(device)}))


def _fitted(program: Program, wanted: Options) -> Settings:
    """Settings whose windows fit the graph: axes that Dynamo fixed decide batch and length."""
    given = dict(wanted.settings)
    if isinstance(wanted.calibration, torch.Tensor) and wanted.calibration.dim() == 2:
        given.setdefault("samples", wanted.calibration.shape[0])
        given.setdefault("length", wanted.calibration.shape[1])
    ids = next((n for n in program.inputs if n.name == "input_ids"), None)
    if ids is None:
        raise UsageError(
            "expected a graph that reads token ids to calibrate it, found inputs "
            f"{[n.name for n in program.inputs]}",
            hint="run the model once on plain input_ids first, or pass artifact=",
        )
    rows, length = tensor_type(ids).shape
    if isinstance(length, int):
        if given.get("length", length) != length:
            raise UsageError(
                f"length: expected {length}, which this graph is fixed to, found {given['length']}",
                hint="call torch._dynamo.mark_dynamic(input_ids, 1) before the first call",
            )
        given["length"] = length
    if isinstance(rows, int):
        samples = int(given.get("samples", Settings.samples))
        given["batch"], given["samples"] = rows, max(rows, samples - samples % rows)
    return Settings(**given).for_program(program)


def _callable(
    program: Program, order: Sequence[str | None], target: str, device: torch.device,
    mode: str | None,
) -> Callable[..., Any]:  # fmt: skip
    """The program as a function of Dynamo's inputs, lowered; weights stay packed."""
    from ..codegen.modules import as_module
    from ..codegen.targets import lower

    made = lower(program, target, device=device)
    # Kernels are registered ops of that module, so that Inductor sees one graph around them.
    module: Any = as_module(made, device=device)
    if mode is not None:
        module = torch.compile(module, mode=mode, fullgraph=True)
    names = [n.name for n in made.program.inputs]
    places = [order.index(n) for n in names]
    single = not isinstance(made.program.output.args[0], (tuple, list))

    def call(*args: Any) -> Any:
        out = module(*(args[i] for i in places))
        return (out,) if single else tuple(out)

    call.llmc_program = program  # type: ignore[attr-defined]
    return call


__all__ = ["Options", "compressed", "llmc_backend", "read_options"]
