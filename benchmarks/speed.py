"""What benchmarks of smaller models share: speed of a random model and its smaller forms, files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llmc.compiler import api
from llmc.compiler.analysis.cost import CostModel
from llmc.compiler.ir.graph import Program
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.lowering import runner_for

SETTINGS = {"prefill": (8, 256, 0), "decode": (1, 32, 24)}
"""Batch, prompt tokens and new tokens; a decode is timed without its prompt."""
Clocks = tuple[float, float]


def llama(args: argparse.Namespace) -> Program:
    """A random llama: its weights do not matter for speed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.inner, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads // 2, vocab_size=args.vocab,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return api.capture(LlamaForCausalLM(config).float().eval())


def mixtral(args: argparse.Namespace) -> Program:
    """A random mixture, two of eight experts for each token; half as wide, half as many layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=args.hidden, intermediate_size=args.inner // 2, vocab_size=args.vocab,
        num_hidden_layers=args.layers // 2, num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2, max_position_embeddings=2048,
        num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    return api.capture(MixtralForCausalLM(config).float().eval())


def measured(
    args: argparse.Namespace, passes: str, shares: Iterable[float], target: str, removed: str
) -> dict[str, Any]:
    """Prefill and decode of a random model and its smaller forms, in turn: drift hits all alike.

    passes: a recipe with a place for each share. removed: what the share is of, in the rows.

    Time on the wall and of the processor: on a machine that others use, only the second is steady.
    """
    dense = llama(args)
    programs = {0.0: dense}
    for share in shares:
        programs[share] = api.compile(dense, passes.format(f"{share:g}")).program
    runners = {s: runner_for(p, target, cached=True) for s, p in programs.items()}
    tokens = torch.randint(0, args.vocab, (4096,), generator=torch.Generator().manual_seed(0))
    times: dict[tuple[str, float], list[Clocks]] = {}
    for turn in range(args.rounds + 1):
        for kind, (batch, prompt, new) in SETTINGS.items():
            for share, runner in runners.items():
                found = _timed(runner, tokens, batch, prompt, new)
                if turn:  # the first turn warms up
                    times.setdefault((kind, share), []).append(found)
    rows = [
        {**_speed_row(kind, share, times, programs), removed: share}
        for kind in SETTINGS
        for share in runners
    ]
    parameters = sum(torch.Size(p.shape).numel() for p in dense.params.values() if p.trained)
    return {
        "command": command(), "parameters": parameters, "hidden": args.hidden,
        "target": target, "threads": torch.get_num_threads(), "rounds": args.rounds, "rows": rows,
    }  # fmt: skip


def _timed(runner: Runner, tokens: torch.Tensor, batch: int, prompt: int, new: int) -> Clocks:
    """(wall, processor) seconds of a prefill, or of ``new`` decoding steps behind one."""
    cache = runner.start(batch, prompt + new)
    ids = tokens[: batch * prompt].view(batch, prompt)
    began = time.perf_counter(), time.process_time()
    logits = runner.forward(ids, cache=cache)
    if new:
        began = time.perf_counter(), time.process_time()
    for _ in range(new):
        logits = runner.forward(logits[:, -1].argmax(-1, keepdim=True), cache=cache)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _speed_row(
    kind: str, share: float, times: dict[tuple[str, float], list[Clocks]],
    programs: dict[float, Program],
) -> dict[str, Any]:  # fmt: skip
    """Median tokens/s, how many times as fast as the whole model, and what operations promise."""
    batch, prompt, new = SETTINGS[kind]

    def flops(program: Program) -> int:
        model = CostModel(program, batch, 1 if new else prompt)
        return int(model.table()["total"]["flops"])

    def middle(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    mine, whole = times[kind, share], times[kind, 0.0]
    ratio = {
        clock: [b[i] / a[i] for a, b in zip(mine, whole, strict=True)]
        for i, clock in enumerate(("wall", "processor"))
    }
    left = flops(programs[share]) / flops(programs[0.0])
    stored = programs[share].weight_bytes() / programs[0.0].weight_bytes()
    return {
        "kind": kind, "batch": batch, "prompt": prompt, "new": new,
        "tokens_per_second": batch * (new or prompt) / middle([t[0] for t in mine]),
        "times_as_fast": {clock: middle(r) for clock, r in ratio.items()},
        "range": {clock: [min(r), max(r)] for clock, r in ratio.items()},
        "share_of_flops_removed": 1 - left, "share_of_bytes_removed": 1 - stored,
        "times_as_fast_by_flops": 1 / left,
    }  # fmt: skip


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options of the random model and of how often it is timed."""
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)


def known(path: Path | None, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that an earlier run of the same protocol left, by their passes."""
    if path is None or not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    same = all(data.get(k) == head[k] for k in ("protocol", "calibration"))
    return {r["passes"]: r for r in data["rows"]} if same else {}


def command() -> str:
    """The running command, without where it writes."""
    given = [a for i, a in enumerate(sys.argv[1:]) if a != "--out" and sys.argv[i] != "--out"]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])


def write(path: Path | None, data: dict[str, Any]) -> None:
    """Write results as JSON where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data) + "\n", encoding="utf-8")
