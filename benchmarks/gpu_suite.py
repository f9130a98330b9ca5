"""The kernels on a GPU in one call: right, then microseconds against floors, peers and whole steps.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu.json
    TRITON_INTERPRET=1 python benchmarks/gpu_suite.py --tiny

Where the package is not installed and nothing can be, a link makes this checkout be it:

    mkdir -p .cache/site && ln -sfn "$PWD" .cache/site/llmc && export PYTHONPATH="$PWD/.cache/site"

It needs torch, triton, numpy, jinja2 and sympy; generation by recorded steps needs pydantic as well
(with pydantic-core, annotated-types and typing-inspection), and peers are those that are installed.
Nothing is fetched. Times are medians of CUDA graph replays that rotate over copies of the weight
beyond three times the L2 cache, so that every call reads its weight from memory; shares are of the
copy bandwidth and of the bf16 product measured in the same run. Without a GPU, under the
interpreter, everything runs once and nothing is timed. Each part is a task in another process (see
gpu_work): what fails is a row with its error. What is not timed (numerics, and the first call of
all that will be, which compiles it) runs on many processes at once. The files are written anew
after every few answers, what the budget leaves out is named, and what hangs beyond it is ended; the
screen gets a short page. Exit 4 when a result is beyond its bound or a kernel failed, 5 with
neither a GPU nor the interpreter.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

try:
    import gpu_clock
    import gpu_decode
    import gpu_kernels
    import gpu_numerics
    import gpu_peers
    import gpu_report
    import torch
    from gpu_work import Answer, Task, Workers

    from llmc.codegen.device import unavailable
    from llmc.codegen.tuning.choices import reason
except ModuleNotFoundError as missing:
    package = str(missing.name).partition(".")[0]
    hint = "link it as this file's first lines say" if package == "llmc" else "carry it there"
    sys.exit(f"gpu_suite: expected the package {package}, found none; {hint}")

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (14336, 4096))
TOKENS = (1, 16, 64, 256, 2048, 8)
SECONDS = 520.0
LATE = 18.0  # seconds after the budget at which the run ends itself, whatever hangs
# Of the budget, what is left when a part begins nothing more: room for what comes after.
ROOM = {"numerics": 0.74, "warm": 0.62, "decode": 0.45, "kernels": 0.17, "peers": 0.01}
PROCESSES = 12
SECTIONS = ("numerics", "decode", "kernels", "peers")
TIMED = ("decode", "kernels")
EVERY = 10.0  # seconds between two writings
TINY = gpu_decode.Shapes(
    hidden=128, heads=4, kv_heads=2, width=32, inner=128, vocab=96, layers=1, context=8,
    dtype="fp16",
)  # fmt: skip


class Suite:
    """The parts, most important first, into ``data``, which is written as it grows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.budget = args, gpu_clock.Budget(args.seconds, gpu_clock.started())
        gpu = gpu_clock.on_gpu()
        count = min(PROCESSES, max(1, (os.cpu_count() or 2) - 2)) if gpu else 1
        self.workers = Workers(count)
        self.target = gpu_kernels.machine()
        self.limits = gpu_clock.Limits(None, None)
        self.data: dict[str, Any] = {
            "command": "python benchmarks/gpu_suite.py " + " ".join(sys.argv[1:]),
            "device": torch.cuda.get_device_name() if gpu else "interpreter, not timed",
            "torch": torch.__version__, "tiles": reason(), "limits": vars(self.limits),
            "installed": gpu_peers.present(), "numerics": {}, "kernels": [], "peers": [],
            "decode": [], "seconds": self.budget.taken, "skipped": self.budget.skipped,
        }  # fmt: skip
        self._written = 0.0

    def run(self) -> None:
        """All sections asked for; processes are ended whatever happens."""
        try:
            for name in SECTIONS:
                if name in self.args.only:
                    if name in TIMED and "kernels" in self.args.only and gpu_clock.on_gpu():
                        self.warm()
                    with self.budget.section(name):
                        getattr(self, name)()
                    self.write()
        finally:
            self.workers.close()
            self.write()

    def answers(self, part: str, tasks: Sequence[Task], most: int = 0) -> Iterable[Answer]:
        """Answers of a part as they come."""
        room = ROOM[part] * self.args.seconds
        for answer in self.workers.run(tasks, self.budget, room, most):
            yield answer
            if time.monotonic() - self._written > EVERY:
                self.write()

    def numerics(self) -> None:
        """Logits of whole steps, generations, attention and many tokens, while cases are drawn;
        then each row in both halves, then the rest."""
        tiny = self.args.tiny
        draws = gpu_numerics.draws(self.args.cases, self.target)
        logits = gpu_decode.agreements(TINY if tiny else gpu_decode.Shapes())
        if tiny:
            beside = [*gpu_numerics.generations(3), *gpu_numerics.attention(2)]
        else:
            beside = [*gpu_numerics.generations(), *gpu_numerics.attention(1000),
                      *gpu_numerics.many(self.target)]  # fmt: skip
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        drawn: list[Any] = []

        def take(tasks: Sequence[Task]) -> None:
            for answer in self.answers("numerics", tasks):
                if answer.task in draws:
                    drawn.extend(answer.result or ())
                elif answer.task in logits:
                    self.data["decode"].append(answer.row if answer.error else answer.result)
                    continue
                elif not answer.error:
                    good.append(answer.result)
                if answer.error:
                    bad.append(answer.row)
                self.data["numerics"] = gpu_numerics.summary(good, bad)

        take([*draws, *logits, *beside])
        take(gpu_numerics.cases(drawn, self.args.cases))

    def warm(self) -> None:
        """Compile on all processes, once, what is timed on one; those of whole steps are by now."""
        if "warm" in self.budget.taken:
            return
        pages = (self.args.shapes, self.args.tokens, self.target)
        with self.budget.section("warm"):
            for answer in self.answers("warm", gpu_kernels.warm_ups(*pages), PROCESSES - 2):
                if answer.error:  # the timing says so too, unless it works there
                    print(f"{answer.task.label}: {answer.error}", file=sys.stderr, flush=True)

    def kernels(self) -> None:
        """Microseconds of each."""
        self.data["kernels"] += gpu_kernels.missing(self.target)
        pages = (self.args.shapes, self.args.tokens, self.target)
        self._alone()
        for answer in self.answers("kernels", gpu_kernels.timings(*pages, self.limits), 1):
            self.data["kernels"] += [*(answer.result or ()), *([answer.row] * bool(answer.error))]

    def decode(self) -> None:
        """Tokens per second."""
        self._alone()
        sizes = TINY if self.args.tiny else gpu_decode.Shapes()
        for answer in self.answers("decode", gpu_decode.steps(sizes, self.limits), 1):
            self.data["decode"].append(answer.row if answer.error else answer.result)

    def peers(self) -> None:
        """Everybody else, at the same shapes, and the step as torch compiles it."""
        self._alone()
        if not self.args.tiny:
            compiled = gpu_decode.steps(gpu_decode.Shapes(), self.limits, [gpu_decode.COMPILED])
            for answer in self.answers("peers", compiled, 1):
                self.data["decode"].append(answer.row if answer.error else answer.result)
        tasks = [t for N, K in self.args.shapes for t in gpu_peers.tasks(N, K, self.args.tokens)]
        tasks.append(Task("liger", gpu_peers.liger, (2048, 4096), 60.0, (("peer", "liger"),)))
        for answer in self.answers("peers", tasks, 1):
            self.data["peers"] += [*(answer.result or ()), *([answer.row] * bool(answer.error))]

    def _alone(self) -> None:
        """End all processes but one, which measures the device's limits first."""
        self.workers.close(keep=1)
        if self.limits.copy is None and gpu_clock.on_gpu():
            for answer in self.workers.run([Task("limits", gpu_clock.limits)], self.budget):
                self.limits = answer.result or self.limits
                self.data["limits"] = vars(self.limits) | {"error": answer.error}

    def write(self) -> None:
        """The files as far as the run has come, whole or not at all."""
        self._written = time.monotonic()
        out: Path | None = self.args.out
        if out is None:
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((out, json.dumps(self.data, indent=1) + "\n"),
                           (out.with_suffix(".md"), gpu_report.markdown(self.data))):  # fmt: skip
            beside = path.with_suffix(path.suffix + ".part")
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)

    @property
    def wrong(self) -> bool:
        """Whether a result is beyond its bound, or a kernel of llmc's failed."""
        return bool(gpu_report.problems({**self.data, "peers": []}))


def main() -> int:
    """Run the sections asked for; exit 4 when a result is wrong, 5 without a device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=",".join(SECTIONS))
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--cases", type=int, default=480, help="of numerics, at most")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for the interpreter")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # A device that answers nothing, a process that cannot be killed: the files are there by then.
    left = gpu_clock.Budget(args.seconds, gpu_clock.started()).left
    faulthandler.dump_traceback_later(max(0.0, left) + LATE, exit=True)
    if why := unavailable():
        print(
            f"gpu_suite: expected a GPU or the interpreter, found neither: {why}", file=sys.stderr
        )
        return 5
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(SECTIONS):
        parser.error(f"--only: expected {','.join(SECTIONS)}, found {','.join(sorted(unknown))}")
    args.shapes = [(int(n), int(k)) for n, k in (s.split("x") for s in args.shapes.split(","))]
    args.tokens = [int(t) for t in args.tokens.split(",")]
    if args.tiny:
        args.shapes, args.tokens = [(70, 136)], [1, 3]
    suite = Suite(args)
    suite.run()
    if args.out is None:
        print(json.dumps(suite.data, indent=1))
    print(gpu_report.brief(suite.data), file=sys.stderr, flush=True)
    return 4 if suite.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
