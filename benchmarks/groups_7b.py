"""Time and memory of the group analysis of a model of 7 billion parameters.

    python benchmarks/groups_7b.py

A Llama of 32 layers, 4096 channels and 32 heads is captured without weight memory; then segments,
dimensions and dependency groups are found, and a cut of every group of neurons and heads is planned
and applied to the graph. Times are wall time with one thread; memory is the process's peak, torch
and the capture included. Writes ``results/groups_7b.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.analysis.cut import cut
from llmc.compiler.analysis.dimensions import Dimensions
from llmc.compiler.analysis.groups import dependency_groups
from llmc.compiler.capture.huggingface import build, facts_of, fake, trace_model
from llmc.compiler.capture.normalise import normalise
from llmc.compiler.capture.sources import Leaf
from llmc.compiler.ir.graph import Program

SECONDS, GIB = 10.0, 2.0
"""What the analysis may take at most."""

SHAPE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip


def no_weight() -> torch.Tensor:
    """Stands where a tensor would be loaded: the analysis never gets here."""
    raise RuntimeError("expected no tensor to be read")


def captured(layers: int) -> Program:
    """The program of a Llama whose weights exist nowhere, stored as bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers)
    model, attention = build(config, LlamaForCausalLM)
    stored = {
        name: Leaf((name,), tuple(p.shape), torch.bfloat16, no_weight)
        for name, p in model.named_parameters()
    }
    buffers = {
        name: Leaf((name,), tuple(b.shape), b.dtype, no_weight, trained=False, keep=True)
        for name, b in model.named_buffers()
    }
    facts = facts_of(config, model, None)
    fake(model)
    program = trace_model(model, stored | buffers, facts, attention)
    normalise(program)
    return program


def timed(seconds: dict[str, float], name: str, action: Callable[[], Any]) -> Any:
    """What the action returns; its seconds are noted under a name."""
    gc.collect()
    start = time.perf_counter()
    result = action()
    seconds[name] = round(time.perf_counter() - start, 2)
    print(f"{name:12s} {seconds[name]:6.2f} s", flush=True)
    return result


def peak() -> float:
    """GiB that the process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure, print and write the JSON; fails where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "groups_7b.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    program = timed(seconds, "capture", lambda: captured(args.layers))
    before = peak()
    timed(seconds, "segments", lambda: apply_segments(program))
    dims = timed(seconds, "dimensions", lambda: Dimensions(program))
    groups = timed(seconds, "groups", lambda: dependency_groups(program, dims))
    analysis = round(sum(seconds[k] for k in ("segments", "dimensions", "groups")), 2)
    memory = round(peak(), 2)
    free = [g for g in groups if not g.blocked and g.kind in ("neuron", "head")]
    keep = {g: torch.arange(g.units * 3 // 4) for g in free}
    small = program.clone()
    timed(seconds, "cut", lambda: cut(small, keep))
    record = {
        "command": "python benchmarks/groups_7b.py", "torch": torch.__version__,
        "python": platform.python_version(), "threads": 1, "layers": args.layers,
        "parameters": sum(torch.Size(p.shape).numel() for p in program.params.values()),
        "nodes": len(program.graph.nodes),
        "groups": dict(sorted(Counter(g.kind for g in groups).items())),
        "seconds": seconds, "analysis_seconds": analysis, "limit_seconds": SECONDS,
        "peak_gib": memory, "peak_gib_before_analysis": round(before, 2), "limit_gib": GIB,
        "bytes_after_cut": small.weight_bytes(), "bytes": program.weight_bytes(),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if analysis > SECONDS or memory > GIB:
        raise SystemExit(f"expected {SECONDS} s and {GIB} GiB, found {analysis} s and {memory} GiB")
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
