"""What this machine can run, and why not: each check is one row with what to do about it.

Nothing is measured and nothing is written; ``trial`` runs a tiny compressed model on every target.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..ir.errors import LlmcError

Verdict = Literal["ok", "no", "note"]
_CUDA_LEAST = (8, 0)
# Distribution -> what llmc uses it for; none of them is needed to compress or to run.
OPTIONAL = {
    "compressed-tensors": "checking compressed-tensors exports with their own loader",
    "gguf": "writing GGUF files",
    "onnx": "writing ONNX files",
    "onnxruntime": "checking and timing ONNX exports",
    "matplotlib": "plots of benchmarks",
    "torchao": "a peer in benchmarks",
}
VARIABLES = {
    "LLMC_TRACE": "every compile is traced there",
    "LLMC_PASSES": "pass files of your own",
    "LLMC_CHECK": "0 turns the verifier off",
    "LLMC_DEBUG": "1 shows tracebacks",
    "TRITON_INTERPRET": "1 runs kernels on the CPU, to debug them",
    "XDG_CACHE_HOME": "where kernels and measurements are kept",
    "HF_HUB_OFFLINE": "1 keeps the hub out",
    "OMP_NUM_THREADS": "threads of torch on the CPU",
}


@dataclass(frozen=True)
class Check:
    """One fact about the machine.

    Attributes:
        about: group of the check. name, found: what, in words.
        verdict: ``ok``; ``no``, something cannot run; ``note``, worth knowing.
        remedy: what to do about it; "" where there is nothing to do.
        needed: whether llmc itself cannot work without it.
    """

    about: str
    name: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
    needed: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Check]:
    """All checks, in the order in which they are shown."""
    return [c for part in (_packages, _machine, _targets, _caches, _optional, _variables)
            for c in part()]  # fmt: skip


def _packages() -> Iterator[Check]:
    """Versions of what llmc depends on, against the ranges that it states."""
    from packaging.requirements import Requirement

    yield Check("packages", "python", sys.version.split()[0])
    try:
        stated = importlib.metadata.requires("llmc") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "llmc", "not installed as a package", "note",
                    "pip install llmc, or run from a clone by make setup")  # fmt: skip
        return
    for text in stated:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        yield _version(need)


def _version(need: Any) -> Check:
    wanted = str(need.specifier) or "any version"
    try:
        found = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", need.name, "not installed", "no",
                     f"pip install '{need.name}{need.specifier}'", True)  # fmt: skip
    if need.specifier.contains(found, prereleases=True):
        return Check("packages", need.name, found)
    return Check("packages", need.name, f"{found}, expected {wanted}", "no",
                 f"pip install '{need.name}{need.specifier}'", True)  # fmt: skip


def _machine() -> Iterator[Check]:
    from ...codegen.tuning.cache import cpu_name

    yield Check("machine", "processor", f"{cpu_name()}; {os.cpu_count()} cores, "
                f"torch uses {torch.get_num_threads()}")  # fmt: skip
    free = _free_memory()
    if free is not None:
        yield Check("machine", "memory", f"{free / 1e9:.1f} GB free")
    disk = shutil.disk_usage(Path.cwd()).free
    yield Check("machine", "disk here", f"{disk / 1e9:.1f} GB free")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Check("machine", "GPU", "torch sees none", "note")
    for i in range(count):
        have = torch.cuda.get_device_capability(i)
        name = f"{torch.cuda.get_device_name(i)}, sm_{have[0]}{have[1]}"
        if have < _CUDA_LEAST:
            yield Check("machine", f"GPU {i}", name, "no",
                        "kernels need sm_80 or newer; the reference target runs on it")  # fmt: skip
        else:
            yield Check("machine", f"GPU {i}", name)


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _targets() -> Iterator[Check]:
    """What each target would run on here; what none of them can falls to the reference."""
    from ...codegen.device import interpreting, unavailable

    yield Check("targets", "reference", "every op by its own definition; always runs")
    yield Check("targets", "cpu", "torch's own int4 and int8 products; the reference elsewhere")
    why = unavailable()
    if why is not None:
        yield Check("targets", "triton", why, "no",
                    "use target cpu; TRITON_INTERPRET=1 runs kernels to debug them")  # fmt: skip
    elif interpreting():
        yield Check("targets", "triton", "the interpreter, on the CPU", "note",
                    "unset TRITON_INTERPRET to compile kernels")  # fmt: skip
    else:
        yield Check("targets", "triton", "kernels are compiled at first use")
    yield _ahead_of_time()
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        yield Check("targets", "C++ compiler", "none", "note",
                    "install g++ for what torch.compile generates on the CPU")  # fmt: skip
    else:
        yield Check("targets", "C++ compiler", compiler)


def _ahead_of_time() -> Check:
    import importlib.util

    name = "kernels --aot"
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return Check("targets", name, "triton is not installed", "no", "pip install 'triton>=3.6'")
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    missing = [t for t in ("ptxas", "cuobjdump", "nvdisasm") if not (tools / t).is_file()]
    if missing:
        return Check("targets", name, f"triton without {', '.join(missing)}", "no",
                     "install triton from PyPI for Linux on x86-64 or aarch64")  # fmt: skip
    return Check("targets", name, "compiles for sm_80 and sm_90 without a GPU")


def _caches() -> Iterator[Check]:
    from ...codegen.source import cache_folder
    from ...codegen.tuning.cache import Machine, cpu_name, read
    from ...codegen.tuning.choices import gpu

    try:
        yield Check("caches", "kernels", str(cache_folder()))
    except LlmcError as error:
        yield Check("caches", "kernels", error.message, "no", error.hint or "make it your own")
    machines = [Machine("cpu", cpu_name())]
    if (device := gpu()) is not None:
        machines.append(device)
    for machine in machines:
        found = read(machine)
        name = f"measured for {machine.target}"
        if found.table is None:
            yield Check("caches", name, found.reason, "note",
                        f"llmc tune --target {machine.target}")  # fmt: skip
        else:
            yield Check("caches", name, f"{len(found.table.entries)} choices in {found.path}")


def _optional() -> Iterator[Check]:
    for name, use in OPTIONAL.items():
        try:
            yield Check("optional", name, f"{importlib.metadata.version(name)}: {use}")
        except importlib.metadata.PackageNotFoundError:
            yield Check("optional", name, f"not installed: {use}", "note", f"pip install {name}")


def _variables() -> Iterator[Check]:
    for name, meaning in VARIABLES.items():
        if name in os.environ:
            yield Check("environment", name, f"{os.environ[name]!r}: {meaning}", "note")


def trial(listen: Callable[[str], None] = lambda text: None) -> list[Check]:
    """A tiny model with 4-bit weights through every target that runs here, against the reference.

    Each answer is judged by the largest difference of a logit over the largest logit.
    """
    from ...codegen.device import unavailable
    from ..pipeline import recipe, zoo
    from ..pipeline.compile import compile_plan
    from ..pipeline.measure import model_inputs
    from ..pipeline.plan import make_plan
    from .lowering import runner_for

    program = zoo.decoder(hidden=64, inner=128, size=16)
    done = compile_plan(make_plan(program, recipe.from_strings(["w4:group=32,solver=rtn"])), None)
    ids = torch.arange(8).reshape(1, 8)
    inputs: Any = model_inputs(ids)
    wanted = runner_for(done.program, "reference").forward(**inputs)
    names = ["cpu"] + (["triton"] if unavailable() is None else [])
    found = []
    for name in names:
        listen(name)
        try:
            got = runner_for(done.program, name).forward(**inputs).cpu()
        except LlmcError as error:
            found.append(Check("trial", name, error.message, "no", error.hint or ""))
            continue
        error_ = float((got - wanted).abs().max() / wanted.abs().max())
        right = error_ < 0.03
        found.append(Check("trial", name, f"largest difference {error_:.1e} of the largest logit",
                           "ok" if right else "no",
                           "" if right else "a wrong result: please report it with this table",
                           needed=not right))  # fmt: skip
    return found
