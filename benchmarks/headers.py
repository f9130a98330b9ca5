"""How long `llmc inspect` takes on an artefact of 100 GB, of which only headers are there.

    python benchmarks/headers.py

The weight files are sparse: a true header, then a hole as long as the tensors would be. Graph,
manifest and plan are those of `w8` on a Llama whose weights exist nowhere. Time is wall time of the
whole command, Python's start and torch's import included. Writes ``results/headers.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groups_7b import SHAPE, captured

from llmc.compiler.analysis.blocks import apply_segments
from llmc.compiler.ir.graph import Param
from llmc.compiler.ir.types import short
from llmc.compiler.pipeline import recipe
from llmc.compiler.pipeline.plan import make_plan
from llmc.compiler.runtime import artefact, tensors
from llmc.compiler.runtime.files import Folder
from llmc.compiler.runtime.manifest import Tensor

SECONDS = 2.0
_NAMES = {own: theirs for theirs, own in tensors._STORED.items()}


def write_holes(
    folder: Folder, name: str, params: Sequence[Param], weights: Any, roles: Mapping[str, str]
) -> dict[str, Tensor]:
    """In the place of the artefact's own writer: header and hole; hashes are of nothing."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for p in sorted(params, key=lambda p: p.name):
        start, end = end, end + p.bytes
        header[p.name] = {
            "dtype": _NAMES[short(p.dtype)], "shape": list(p.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)

    folder.write_with(name, write)
    return {
        p.name: Tensor(file=name, dtype=short(p.dtype), shape=list(p.shape),
                       role=roles.get(p.name, "unused"), sha256="0" * 64)
        for p in params
    }  # fmt: skip


def main() -> int:
    """Make the artefact, time the command; exit 4 when it takes longer than it should."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--width", type=int, default=11264)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/headers.json")
    args = parser.parse_args()
    wide = args.width
    SHAPE.update(hidden_size=wide, intermediate_size=7 * wide // 2, num_attention_heads=wide // 128,
                 num_key_value_heads=8)  # fmt: skip
    program = captured(args.layers)
    apply_segments(program)
    plan = make_plan(program, recipe.from_strings(["w8"]))
    artefact.write_tensors = write_holes  # type: ignore[assignment]
    artefact._file = lambda folder, name: artefact.File(  # type: ignore[attr-defined]
        sha256="0" * 64, size=(folder.path / name).stat().st_size, content=False
    )
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "big"
        contents = artefact.Contents(
            plan.program, plan=plan.to_json(), graphs=[(s.name, s.graph) for s in plan.snapshots]
        )
        artefact.new_folder = _without_space_check(artefact.new_folder)
        artefact.save(out, contents)
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        times = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            command = [sys.executable, "-m", "llmc.compiler.cli", "inspect", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            times.append(time.perf_counter() - began)
    print(done.stdout.splitlines()[0].replace(str(out), "big"))
    data = {
        "command": "python benchmarks/headers.py", "layers": args.layers, "bytes": size,
        "nodes": len(plan.program.graph.nodes), "seconds": round(statistics.median(times), 3),
        "fastest": round(min(times), 3), "limit": SECONDS,
        "machine": {"cpu": platform.processor() or platform.machine(),
                    "python": platform.python_version()},
    }  # fmt: skip
    print(json.dumps(data, indent=1))
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if data["seconds"] <= SECONDS else 4


def _without_space_check(made: Any) -> Any:
    """The disk need not hold what is a hole."""
    return lambda path, needed, force: made(path, needed=1 << 20, force=force)


if __name__ == "__main__":
    sys.exit(main())
