"""A program as a checkpoint that plain ``from_pretrained`` loads, checked by loading it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import GateError
from ..ir.graph import Param, Program
from ..ir.interpret import run
from .bisimulate import evaluate
from .configs import quiet
from .fit import Fitted

# The largest difference of a logit, as a share of the largest logit, in fp32: both sides sum in
# other orders.
TOLERANCE = 1e-4
SHARD = "5GB"
_BATCH, _LENGTH, _SEED = 2, 12, 0
# What says how to speak to a model; everything else in a folder is weights or config.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip


def stored_dtype(program: Program) -> torch.dtype:
    """The floating dtype that most bytes of the program's dense weights are stored in."""
    count: Counter[torch.dtype] = Counter()
    for p in program.params.values():
        if p.trained and not p.keep and p.dtype.is_floating_point:
            count[p.dtype] += p.bytes
    return count.most_common(1)[0][0] if count else torch.float32


Packed = Mapping[str, Callable[[], dict[str, torch.Tensor]]]
"""Tensors instead of a weight, by its name in the captured model: by the checkpoint's own names."""


def bytes_of(fitted: Fitted, dtype: torch.dtype, packed: Packed | None = None) -> int:
    """Bytes of the checkpoint's tensors, without those that are written packed."""
    model = fitted.captured.program.params
    dense = [n for n in fitted.match.values if n not in (packed or {})]
    return sum(torch.Size(model[name].shape).numel() for name in dense) * dtype.itemsize


def write(
    fitted: Fitted, folder: Path, dtype: torch.dtype, side: Path | None,
    packed: Packed | None = None, quantization: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write config, sharded safetensors, generation config and tokenizer files into a folder.

    Args:
        side: where :data:`SIDE_FILES` are copied from, where it has them.
        packed: weights that are written as other tensors. quantization: the quantization_config.
    Raises:
        ModelError: a tensor that is missing or not finite.
    """
    captured, program = fitted.captured, fitted.program
    packed = packed or {}
    for name, node in fitted.match.values.items():
        if name not in packed:
            captured.put(name, evaluate(program, node), dtype)
    for name in fitted.match.blank:
        captured.put(name, torch.zeros(captured.program.params[name].shape), dtype)
    with quiet():
        model, _ = fitted.family.make(fitted.changes)
        model.to(dtype)
        instead = {n for name in packed for n in captured.program.params[name].names}
        # What the model stores and never reads has no place in a program: it is written as zeros.
        state = {
            name: captured.store[name]
            if captured.store[name].device.type != "meta"
            else torch.zeros(tensor.shape, dtype=tensor.dtype)
            for name, tensor in model.state_dict().items()
            if name not in instead
        }
        for tensors in packed.values():
            state |= tensors()
        if quantization is not None:
            model.config.quantization_config = quantization
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    for name in SIDE_FILES:
        if side is not None and (side / name).is_file():
            shutil.copyfile(side / name, folder / name)


def check(fitted: Fitted, folder: Path) -> tuple[float, float]:
    """Load the folder as anyone would and compare its logits on random tokens, in fp32.

    The program runs with its weights as they were written: what a smaller dtype rounds away is told
    apart, and is no failure.

    Returns:
        The largest difference of a logit as a share of the largest one: of the loaded model to the
        program with the weights as written, and of that to the program itself.
    Raises:
        GateError: tensors that are missing, left over or misshapen, or other logits.
    """
    with quiet():
        model, loaded = fitted.family.model.from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loaded.get(kind):
            first = sorted(map(str, loaded[kind]))[0]
            raise GateError(
                f"expected a checkpoint that loads whole, found {kind.replace('_', ' ')}: {first}"
            )

    def run_model(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        out = model.eval()(input_ids=inputs["input_ids"])
        logits: torch.Tensor = out.logits if "logits" in out else out[0]
        return logits

    return compare(fitted, run_model)


def compare(
    fitted: Fitted, model: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    instead: Mapping[str, torch.Tensor] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Compare a model that was read back with the program on random tokens; see :func:`check`.

    Args:
        model: from ``input_ids``, ``position_ids`` and ``attention_mask`` to logits.
        instead: weights that were written packed, decoded, by name in the captured model.
    Raises:
        GateError: other logits.
    """
    inputs = _tokens(fitted)
    with torch.no_grad():
        exact, folded = (logits(p, inputs) for p in (fitted.given, fitted.program))
        written = logits(_as_written(fitted, instead or {}), inputs)
        have = model(inputs)
    _apart(folded, exact, "the program's logits after folding")
    return _apart(have, written, "the written model's logits"), _share(written, exact)


def logits(program: Program, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The program's result on those of the inputs that it takes."""
    names = {n.name for n in program.inputs}
    out: torch.Tensor = run(program, {k: v for k, v in inputs.items() if k in names})
    return out


def _share(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).abs().max() / want.abs().max().clamp(min=1e-30))


def _apart(have: torch.Tensor, want: torch.Tensor, what: str) -> float:
    """Raises GateError unless two tensors of logits agree."""
    if tuple(have.shape) != tuple(want.shape):
        raise GateError(f"expected {what} {list(want.shape)}, found {list(have.shape)}")
    apart = _share(have, want)
    if not apart <= TOLERANCE:
        raise GateError(f"expected {what} within {TOLERANCE:g} of the largest, found {apart:.3g}")
    return apart


def _tokens(fitted: Fitted) -> dict[str, torch.Tensor]:
    facts = fitted.program.facts
    vocab, context = facts.get("vocab"), facts.get("context")
    top = vocab if isinstance(vocab, int) else 2
    length = min(_LENGTH, context) if isinstance(context, int) else _LENGTH
    ids = torch.randint(top, (_BATCH, length), generator=torch.Generator().manual_seed(_SEED))
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand(_BATCH, -1),
        "attention_mask": torch.ones(_BATCH, length, dtype=torch.bool),
    }


def _as_written(fitted: Fitted, instead: Mapping[str, torch.Tensor]) -> Program:
    """The program whose constant values are those that the checkpoint holds."""
    program = fitted.program.clone()
    captured = fitted.captured
    for name, node in fitted.match.values.items():
        there = program.node(node.name)
        tensor = instead.get(name)
        tensor = captured.program.weights.load(name) if tensor is None else tensor
        new = f"written.{name}"
        param = Param(new, tuple(tensor.shape), tensor.dtype, keep=not tensor.is_floating_point())
        place = program.add_param(param, tensor, before=there, made_by="write_back")
        there.replace_all_uses_with(place)
    program.prune()
    return program
