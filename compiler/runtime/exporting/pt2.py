"""``pt2``: an AOTInductor package, compiled for this machine's processor; needs torch alone to run.

The package holds machine code: whoever loads it runs it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import ResourceError, UsageError
from ...ir.types import short
from ..artefact import versions
from ..files import canonical_json, new_folder
from .exported import TOLERANCE, compare, exported, quiet
from .job import OVERHEAD, RECORD, Job

FILE = "model.pt2"
# It warns about its own file names.
_PACKAGER = "torch._inductor.package.package"


def write(job: Job) -> dict[str, Any]:
    """Compile a job and write the package.

    Returns:
        Its record, see :func:`..export.export`.
    Raises:
        ResourceError: no C++ compiler. UsageError: a graph that torch.export refuses, or a dtype.
        GateError: the loaded package gives other logits; nothing is left.
    """
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise ResourceError(f"expected a C++ compiler, found no {compiler}", hint="install g++")
    if job.dtype is not None and job.dtype != job.program.dtype:
        raise UsageError(
            f"--dtype: expected {short(job.program.dtype)}, in which the graph computes, "
            f"found {short(job.dtype)}"
        )
    stored = sum(job.program.stored_bytes().values())
    with new_folder(job.folder, needed=4 * stored + OVERHEAD, force=job.force) as out:
        job.tell("exporting the graph")
        made = exported(job.program)
        job.tell("compiling it")
        path = out.path / FILE
        with quiet(_PACKAGER):
            torch._inductor.aoti_compile_and_package(made, package_path=str(path))
        job.tell("loading it and comparing logits")
        apart = compare(job.program, _loaded(path))
        record = {
            "format": "pt2", "architecture": str(job.program.facts.get("architecture", "program")),
            "dtype": short(job.program.dtype), "bytes": path.stat().st_size, "left_out": [],
            "difference": apart, "rounding": 0.0, "tolerance": TOLERANCE, "versions": versions(),
            "inputs": [n.name for n in job.program.inputs],
            "notes": ["made for this processor and this version of torch; it holds machine code, "
                      "which runs when it is loaded", "without a KV cache: all tokens at once"],
        }  # fmt: skip
        out.write(RECORD, canonical_json(record))
        out.adopt()
    return record


def _loaded(path: Path) -> Any:
    with quiet(_PACKAGER):
        package = torch._inductor.aoti_load_package(str(path))

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        found = package(*inputs.values())
        return found if isinstance(found, torch.Tensor) else found[0]

    return run
