"""Width pruning: perplexity of the demo model by method, and speed of a larger model by share.

    python benchmarks/width.py quality --out benchmarks/results/width.json
    python benchmarks/width.py speed --out benchmarks/results/width_speed.json

Quality: the same share of the blocks' parameters goes by every method, ranked against FLAP by a
paired bootstrap over the held-out windows; nothing is tuned on that text. Speed: one process times
the whole model and its cuts in turn, round after round, beside the share of operations removed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmc.compiler import api
from llmc.compiler.analysis.blocks import is_block, segments_of
from llmc.compiler.analysis.cost import CostModel
from llmc.compiler.ir.graph import Program
from llmc.compiler.pipeline.data import Tokenizer, read_stream
from llmc.compiler.runtime.evaluate import Evaluation, compare, evaluate
from llmc.compiler.runtime.executor import Runner
from llmc.compiler.runtime.lowering import runner_for

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "pylm"
AGAINST = ("flap", "flap, one share")

# One share of every layer and kind goes, or layers and kinds compete ("global" in the knobs), which
# is how FLAP is published; without a repair, or with what the method itself repairs.
METHODS = {
    "random, seed 0": "method=random,seed=0",
    "random, seed 1": "method=random,seed=1",
    "random, seed 2": "method=random,seed=2",
    "magnitude, one share": "method=magnitude",
    "wanda, one share": "method=wanda",
    "taylor vector, one share": "method=taylor,taylor=vector",
    "taylor first, one share": "method=taylor,taylor=first",
    "taylor second, one share": "method=taylor,taylor=second",
    "taylor mixed, one share": "method=taylor,taylor=mixed",
    "michel, one share": "method=michel",
    "obs, one share, no repair": "method=obs,compensate=none",
    "flap, one share, no bias": "method=flap,compensate=none",
    "flap, one share": "method=flap",
    "magnitude": "method=magnitude,ranking=global",
    "wanda": "method=wanda,ranking=global",
    "taylor vector": "method=taylor,taylor=vector,ranking=global",
    "taylor first": "method=taylor,taylor=first,ranking=global",
    "taylor second": "method=taylor,taylor=second,ranking=global",
    "flap, no bias": "method=flap,ranking=global,compensate=none",
    "flap": "method=flap,ranking=global",
    "taylor second + moved weights": (
        "method=taylor,taylor=second,ranking=global,compensate=weights"
    ),
    "flap + moved weights": "method=flap,ranking=global,compensate=weights",
    "obs (moves weights)": "method=obs,ranking=global",
    "obs (moves weights), one share": "method=obs",
    "taylor second + moved weights, equal layers": (
        "method=taylor,taylor=second,ranking=global,uniform=true,compensate=weights"
    ),
    "taylor second + moved weights, one share": ("method=taylor,taylor=second,compensate=weights"),
    "flap, one share, neurons only": "method=flap,units=neuron",
    "obs (moves weights), one share, neurons only": "method=obs,units=neuron",
}


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Compile and evaluate every method at one share; written after each, so that it can go on."""
    stream = read_stream(args.data, Tokenizer(MODEL))

    def score(program: Program) -> Evaluation:
        runner = Runner(program, resident="dense")
        return evaluate(runner, stream, args.window, batch=8, limit=args.windows)

    dense = api.capture(MODEL)
    found = {"dense": score(dense)}
    rows: list[dict[str, Any]] = [_row("dense", "", found["dense"], dense, 0.0, [])]
    first = found["dense"].to_json()
    kept = ("data", "sha256", "window", "windows", "tokens", "protocol")
    head = {
        "command": _command(), "protocol": {k: first[k] for k in kept},
        "calibration": {"samples": args.samples, "length": args.length, "seed": 0},
        "removed_share_of_block_parameters": args.remove,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    known = _known(args.out, head)
    for name, knobs in METHODS.items():
        passes = f"prune_width:remove={args.remove:g},{knobs}"
        if passes in known:
            rows.append(known[passes] | {"name": name})
            found[name] = replace(found["dense"], nll=tuple(known[passes]["nll"]))
            continue
        began = time.perf_counter()
        small = api.compile(MODEL, passes, calibration=args.calibration, samples=args.samples,
                            length=args.length)  # fmt: skip
        seconds = time.perf_counter() - began
        found[name] = score(small.program)
        assert small.solved is not None
        records = small.solved.structure[0]["records"]
        rows.append(_row(name, passes, found[name], small.program, seconds, records))
        print(f"{name}: {found[name].perplexity:.3f}", file=sys.stderr, flush=True)
        _write(args.out, {**head, "rows": rows})
    pairs = [
        {"method": name, "against": other, **compare(found[name], found[other]).to_json()}
        for other in AGAINST
        for name in found
        if name not in ("dense", other)
    ]
    return {**head, "rows": rows, "pairs": pairs}


def _known(path: Path | None, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that an earlier run of the same protocol left, by their passes."""
    if path is None or not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    same = all(data.get(k) == head[k] for k in ("protocol", "calibration"))
    return {r["passes"]: r for r in data["rows"]} if same else {}


def _row(
    name: str, passes: str, e: Evaluation, program: Program, seconds: float, records: list[Any]
) -> dict[str, Any]:
    """One line of the table; widths are those of the groups that the pass saw."""
    return {
        "name": name, "passes": passes, "perplexity": e.perplexity,
        "block_parameters": _block_parameters(program), "bytes": program.weight_bytes(),
        "compile_seconds": round(seconds, 1),
        "nll": list(e.nll),
        "widths": {r["site"]: r["units_after"] for r in records if "units_after" in r},
    }  # fmt: skip


def _block_parameters(program: Program) -> int:
    inside = {n for s in segments_of(program) if is_block(s.name) for n in s.nodes}
    return sum(
        torch.Size(p.shape).numel()
        for n in program.graph.nodes
        if n.name in inside and (p := program.param_of(n)) is not None and p.trained
    )


def _llama(args: argparse.Namespace) -> Program:
    """A random llama: its weights do not matter for speed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.inner, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads // 2, vocab_size=args.vocab,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return api.capture(LlamaForCausalLM(config).float().eval())


SETTINGS = {"prefill": (8, 256, 0), "decode": (1, 32, 24)}
"""Batch, prompt tokens and new tokens; a decode is timed without its prompt."""
Clocks = tuple[float, float]


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode of the whole model and its cuts, in turn, so that drift hits all alike.

    Time on the wall and of the processor: on a machine that others use, only the second is steady.
    """
    dense = _llama(args)
    programs = {0.0: dense}
    for share in args.shares:
        passes = f"prune_width:remove={share:g},method=magnitude"
        programs[share] = api.compile(dense, passes).program
    runners = {s: runner_for(p, "reference", cached=True) for s, p in programs.items()}
    tokens = torch.randint(0, args.vocab, (4096,), generator=torch.Generator().manual_seed(0))
    times: dict[tuple[str, float], list[Clocks]] = {}
    for turn in range(args.rounds + 1):
        for kind, (batch, prompt, new) in SETTINGS.items():
            for share, runner in runners.items():
                found = _timed(runner, tokens, batch, prompt, new)
                if turn:  # the first turn warms up
                    times.setdefault((kind, share), []).append(found)
    rows = [_speed_row(kind, share, times, programs) for kind in SETTINGS for share in runners]
    parameters = sum(torch.Size(p.shape).numel() for p in dense.params.values() if p.trained)
    return {
        "command": _command(), "parameters": parameters, "hidden": args.hidden,
        "threads": torch.get_num_threads(), "rounds": args.rounds, "rows": rows,
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
        "removed_share_of_block_parameters": share,
        "tokens_per_second": batch * (new or prompt) / middle([t[0] for t in mine]),
        "times_as_fast": {clock: middle(r) for clock, r in ratio.items()},
        "range": {clock: [min(r), max(r)] for clock, r in ratio.items()},
        "share_of_flops_removed": 1 - left, "share_of_bytes_removed": 1 - stored,
        "times_as_fast_by_flops": 1 / left,
    }  # fmt: skip


def _command() -> str:
    given = [a for i, a in enumerate(sys.argv[1:]) if a != "--out" and sys.argv[i] != "--out"]
    return "python benchmarks/width.py " + " ".join(given)


def _write(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--data", default=str(MODEL / "text" / "heldout.txt"))
    parser.add_argument("--calibration", default=str(MODEL / "text" / "calibration.txt"))
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="only the first windows of the held-out text")
    parser.add_argument("--only", nargs="*", help="only these methods, and both forms of flap")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.2, 0.4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.only is not None:
        for name in [n for n in METHODS if n not in (*args.only, *AGAINST)]:
            del METHODS[name]
    data = quality(args) if args.what == "quality" else measure_speed(args)
    _write(args.out, data)
    if args.out is None:
        print(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
