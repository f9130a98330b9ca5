"""``gguf``: one file for llama.cpp and what is built on it; codes become blocks as they are.

Integers of 4, 5 and 8 bits in groups of whole blocks are Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0; all other
matrices F16, BF16 or F32. Every tensor is read back from the file before anyone sees it.
"""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import GateError, ResourceError, UsageError
from ...ir.types import short
from ..artefact import versions
from ..files import canonical_json, new_folder
from .codes import Coded, Parts, coded, refuse_grids, without_grids
from .gguf_blocks import BLOCK, KINDS, blocks
from .gguf_words import words
from .job import OVERHEAD, RECORD, Job
from .quantised import rounded_scale

FILE = "model.gguf"
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# What general.file_type says when most weights are of that kind.
_FILE_TYPES = {"F32": "ALL_F32", **{k: f"MOSTLY_{k}" for k in (
    "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}}  # fmt: skip


def write(job: Job) -> dict[str, Any]:
    """Write a job as GGUF.

    Returns:
        Its record, see :func:`..export.export`.
    Raises:
        UsageError: what GGUF has no place for, the layer and the field named. ResourceError: the
        package gguf is missing. GateError: a tensor reads back as another; nothing is left.
    """
    from ...capture import write_back
    from ...capture.bisimulate import evaluate
    from ...capture.configs import say
    from ...capture.fit import fit

    try:
        import gguf
    except ImportError as error:
        raise ResourceError(
            "expected the package gguf, found none", hint="pip install gguf"
        ) from error
    from ...capture.foreign.gguf_names import names_of, runner_of

    plain, grids = without_grids(job.program)
    refuse_grids(plain, grids, "gguf keeps weights alone")
    job.tell("looking for the config")
    fitted = fit(plain, job.tell)
    names = names_of(fitted.family.make(fitted.changes)[0].config)
    dtype = job.dtype or write_back.stored_dtype(plain)
    params = fitted.captured.program.params
    weights: dict[str, Coded] = {}
    for name, node in fitted.match.values.items():
        path = params[name].names[0].rpartition(".")[0]
        weight = coded(fitted.program, name, path, node, {})
        if weight is not None:
            kind_of(weight)
            weights[name] = weight
    size = write_back.bytes_of(fitted, dtype, dict.fromkeys(weights, dict)) + sum(
        w.shape[0] * w.shape[1] * 34 // 32 for w in weights.values()
    )
    with new_folder(job.folder, needed=size + OVERHEAD, force=job.force) as out:
        job.tell(f"writing {job.folder}")
        writer = gguf.GGUFWriter(str(out.path / FILE), names.arch.name)
        expected: dict[str, tuple[str, Tensor]] = {}
        instead: dict[str, Tensor] = {}
        coded_names: set[str] = set()
        for name, node in fitted.match.values.items():
            # A tied head reads the table: GGUF says so by storing one tensor.
            own = params[name].names[0]
            goal = names.rename(own)
            if goal is None:
                raise UsageError(
                    "name: expected a tensor that gguf knows, found another", where=own
                )
            if name in weights:
                kind, data, value = _coded(weights[name])
                instead[name] = value
            else:
                value = evaluate(fitted.program, node).float()
                kind, data, value = _dense(names.ordered(own, value), dtype)
                fitted.captured.put(name, evaluate(fitted.program, node), _kept(value, dtype))
            if name in weights:
                coded_names.add(goal)
                data, value = names.ordered(own, data), names.ordered(own, value)
            expected[goal] = (kind, value)
            _add(writer, gguf, goal, kind, data)
        dense = [n for n, (_, v) in expected.items() if v.dim() > 1 and n not in coded_names]
        told = _settings(writer, gguf, names, expected, job, plain.facts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        job.tell("reading it back and comparing tensors and logits")
        check(out.path / FILE, expected)
        apart, rounded = None, 0.0
        if find_spec("accelerate") is None:
            told.append("logits were not compared: transformers reads GGUF with accelerate only")
        else:
            runner = runner_of(fitted, out.path, FILE)
            apart, rounded = write_back.compare(fitted, runner, instead)
        record = {
            "format": "gguf", "architecture": fitted.family.model.__name__, "arch": names.arch.name,
            "changes": [*fitted.family.written, *say(fitted.changes)], "dtype": short(dtype),
            "bytes": (out.path / FILE).stat().st_size,
            "left_out": list(plain.facts.get("unread") or ()), "versions": versions(),
            "quantised": len(weights), "dense": dense, "difference": apart, "rounding": rounded,
            "tolerance": write_back.TOLERANCE,
            "schemes": dict(Counter(kind_of(w) for w in weights.values())),
            "notes": _notes(weights) + told,
        }  # fmt: skip
        out.write(RECORD, canonical_json(record))
        out.adopt()
    return record


def kind_of(weight: Coded) -> str:
    """The blocks that hold a weight's codes.

    Raises:
        UsageError: there are none; the layer and the field are named.
    """
    codes, columns = weight.codes, weight.shape[1]
    if codes.grid != "uniform":
        raise weight.refuse("grid", "integers", codes.grid, "--format hf writes the weight dense")
    if (codes.bits, codes.symmetric) not in KINDS:
        found = f"{codes.bits}, {'symmetric' if codes.symmetric else 'with zero points'}"
        raise weight.refuse("bits", "4 or 5, or 8 symmetric", found, "compile with w4, w5 or w8")
    if columns % BLOCK:
        raise weight.refuse("inputs", f"a multiple of {BLOCK}", columns,
                            "--format compressed-tensors takes any size")  # fmt: skip
    group = codes.group or columns
    if group % BLOCK or columns % group:
        raise weight.refuse("group", f"a divisor of {columns} in whole blocks of {BLOCK}", group,
                            "compile with group=32, 64 or 128")  # fmt: skip
    return KINDS[codes.bits, codes.symmetric][0]


def _coded(weight: Coded) -> tuple[str, Tensor, Tensor]:
    """Kind, bytes, and the values that they stand for."""
    found = weight.load()
    scale = rounded_scale(weight, found.scale, torch.float16)
    parts = Parts(found.codes, scale, found.zero)
    data = blocks(parts.codes, parts.scale, parts.zero, weight.codes.bits)
    value = parts.dense(weight.codes)
    if parts.zero is not None:
        # m is rounded to fp16, once per group.
        each = weight.shape[1] // parts.scale.shape[1]
        m = -(parts.zero.float() * parts.scale.float()).half().float()
        d = parts.scale.float().repeat_interleave(each, 1)
        value = d * parts.codes.float() + m.repeat_interleave(each, 1)
    return kind_of(weight), data, value


def _kept(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Vectors are F32 whatever matrices are."""
    return torch.float32 if value.dim() < 2 else dtype


def _dense(value: Tensor, dtype: torch.dtype) -> tuple[str, Tensor, Tensor]:
    """Kind, what is written, and the values that it stands for."""
    kind = _kept(value, dtype)
    stored = value.to(kind)
    data = stored.contiguous()
    return _DENSE[kind], data.view(torch.uint8) if kind == torch.bfloat16 else data, stored.float()


def _add(writer: Any, gguf: Any, name: str, kind: str, data: Tensor) -> None:
    """numpy has no bf16: those go as bytes, like blocks."""
    raw = None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, data.contiguous().numpy(), raw_dtype=raw)


def _settings(
    writer: Any, gguf: Any, names: Any, expected: dict[str, tuple[str, Tensor]], job: Job,
    facts: Any,
) -> list[str]:  # fmt: skip
    """Write what is not a tensor; what could not be."""
    for method, value in names.settings:
        getattr(writer, method)(value)
    bytes_ = Counter[str]()
    for kind, value in expected.values():
        bytes_[kind] += value.numel() if value.dim() > 1 else 0
    usual = bytes_.most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[usual]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocab = int(expected["token_embd.weight"][1].shape[0])
    found = words(job.side, vocab, dict(facts))
    if isinstance(found, str):
        return [f"the tokenizer is left out: {found}; llama.cpp needs one"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(found["tokens"])
    writer.add_token_types(found["kinds"])
    writer.add_token_merges(found["merges"])
    for name in ("bos", "eos", "pad"):
        if name in found:
            getattr(writer, f"add_{name}_token_id")(found[name])
    return ["tokenizer.ggml.pre is 'default': how text is split before merging may differ"]


def _notes(weights: dict[str, Coded]) -> list[str]:
    out = []
    if any(not w.codes.symmetric for w in weights.values()):
        out.append("zero points are kept as m = -zero·scale, rounded to fp16")
    if any(w.load().scale.dtype != torch.float16 for w in weights.values()):
        out.append("scales are rounded to fp16")
    if any(w.masked for w in weights.values()):
        out.append("zeros of the n:m mask are kept as codes: no loader runs them as sparse")
    return out


def check(path: Path, expected: dict[str, tuple[str, Tensor]]) -> None:
    """Read a file by the gguf package and compare every tensor.

    Raises:
        GateError: one is missing, left over, of another kind or of other values.
    """
    import gguf
    import numpy as np

    tensors = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))[0]
        raise GateError("expected the tensors that were written, found another set", where=odd)
    for name, (kind, want) in expected.items():
        found = tensors[name]
        if found.tensor_type.name != kind:
            raise GateError(f"expected {kind}, found {found.tensor_type.name}", where=name)
        have = torch.from_numpy(np.array(gguf.dequantize(found.data, found.tensor_type)))
        if have.numel() != want.numel():
            raise GateError(f"expected shape {list(want.shape)}, found another", where=name)
        off = (have.reshape(want.shape) - want).abs().max()
        # The reader multiplies in fp32, in another order where there is an m.
        if not float(off) <= 1e-6 * float(want.abs().max()):
            raise GateError(f"expected the values that were written, found {float(off):.2g} off",
                            where=name)  # fmt: skip
