"""The artefact: a folder that holds a compressed model, and nothing that could run.

``save`` writes it whole or not at all; ``load`` believes none of it before it is checked, in the
order sizes, JSON, fields, paths, hashes, shapes, laws of the IR, and only then reads tensors.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..analysis.latents import check_latents
from ..analysis.rotation import check_rotations
from ..ir.caches import cache_params, load_all
from ..ir.errors import ModelError, UsageError, VerifierError
from ..ir.exits import CLASSIFIER, classifier_of
from ..ir.graph import Param, Program
from ..ir.literals import check_facts
from ..ir.serial import attach, from_json, provenance, to_json
from ..ir.types import short
from ..ir.verifier import verify as verify_program
from . import manifest as manifests
from .files import (
    Folder,
    all_files,
    canonical_json,
    checked_path,
    file_sha256,
    new_folder,
    parse_json,
    read_bytes,
    safe_name,
)
from .manifest import File, Manifest, Tensor
from .sizes import roles
from .tensors import FILE_BYTES, ArtefactWeights, check_headers, files_of, write_tensors

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
)  # fmt: skip
# Facts that a run needs. All others (architecture, source config) are provenance.
NEUTRAL_FACTS = ("vocab", "context", "bos", "eos", "pad")
_CONTENT = ("program.json", "schemes.json")
# Weights up to this size are hashed at every load; above, ``llmc verify`` or verify=True does it.
_HASHED_BY_DEFAULT = 1 << 30
_TOKENIZER_BYTES = 256 << 20


@dataclass
class Contents:
    """What goes into an artefact; everything but the program may stay empty.

    Attributes:
        program: target-neutral, as compiled.
        schemes: JSON of what became of each weight.
        plan, report, run: JSON; ``run`` holds the typed command, times, host and versions.
        passes: applied passes in order, JSON.
        fallbacks: JSON records of solves that fell back.
        graphs: (pass name, program JSON) after each pass, for ``llmc diff``.
        tokenizer: folder with the tokenizer's files, or None.
    """

    program: Program
    schemes: Any = field(default_factory=dict)
    plan: Any = field(default_factory=dict)
    report: Any = field(default_factory=dict)
    run: Any = field(default_factory=dict)
    passes: list[Any] = field(default_factory=list)
    fallbacks: list[Any] = field(default_factory=list)
    graphs: Sequence[tuple[str, dict[str, Any]]] = ()
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Loaded:
    """An artefact that was read: the program's tensors stay in their files until asked for.

    Attributes:
        tokenizer: the folder itself when it holds a tokenizer, else None.
        graphs: names of the per-pass graphs, in order.
    """

    path: Path
    program: Program
    manifest: Manifest
    schemes: Any
    plan: Any
    report: Any
    run: Any
    graphs: tuple[str, ...]
    tokenizer: Path | None

    def graph(self, name: str) -> Program:
        """The program as it was after one pass, without tensors.

        Raises:
            UsageError: no such graph.
        """
        if name not in self.graphs:
            raise UsageError(f"expected a graph of {list(self.graphs)}, found {name!r}")
        data = _listed_json(self.path, self.manifest, f"graphs/{name}.json")
        return from_json(data, ArtefactWeights(self.path, {}))


# ** writing **


def save(path: str | Path, contents: Contents, *, force: bool = False) -> Manifest:
    """Write an artefact to ``path``.

    Args:
        force: replace the artefact that is there, by one rename after the new one is complete.
    Raises:
        UsageError: ``path`` exists without ``force`` or is a folder of something else, or another
            process is writing it.
        ResourceError: too little space, or the file system failed; nothing was changed.
        ModelError: a tensor that is missing, misshapen or not finite.
    """
    program = contents.program
    documents = _documents(contents)
    params = _stored(program)
    weights = sum(p.bytes + 256 for p in params.values())
    needed = weights + sum(len(d) for d in documents.values()) + 512 * (len(params) + 16)
    if force:
        check_replaceable(Path(path))
    kinds = (
        roles(program) | {CLASSIFIER: "classifier"} | dict.fromkeys(cache_params(program), "cache")
    )
    with new_folder(Path(path), needed=needed, force=force) as folder:
        tensors: dict[str, Tensor] = {}
        files: dict[str, File] = {}
        for name, names in files_of(program).items():
            mine = [params[n] for n in names]
            tensors |= write_tensors(folder, name, mine, program.weights, kinds)
            files[name] = _file(folder, name)
        for name, data in documents.items():
            folder.write(name, data)
            files[name] = File(
                sha256=hashlib.sha256(data).hexdigest(), size=len(data), content=name in _CONTENT
            )
        sealed = manifests.make_manifest(
            files, tensors, passes=contents.passes, fallbacks=contents.fallbacks,
            versions=versions(),
        )  # fmt: skip
        folder.write(manifests.NAME, sealed)
    return manifests.read_manifest(sealed)


def _stored(program: Program) -> dict[str, Param]:
    """What is stored as tensors: the graph's parameters, those of exits and of caches."""
    out = {p.name: p for p in program.params.values()} | cache_params(program)
    if program.exits is not None and program.exits.classifies:
        out[CLASSIFIER] = Param(CLASSIFIER, program.exits.shape, torch.float32, keep=True)
    return out


def _file(folder: Folder, name: str) -> File:
    path = folder.path / name
    return File(sha256=file_sha256(path), size=path.stat().st_size, content=False)


def _documents(contents: Contents) -> dict[str, bytes]:
    """Every file but the weights and the manifest."""
    program = contents.program
    neutral, other = split_facts(program.facts)
    origin = {"program": provenance(program), "facts": other}
    values: dict[str, Any] = {
        "program.json": to_json(program) | {"facts": neutral},
        "schemes.json": contents.schemes,
        "provenance.json": origin,
        "plan.json": contents.plan,
        "report.json": contents.report,
        "run.json": contents.run,
    }
    for i, (name, graph) in enumerate(contents.graphs):
        plain = graph | {"facts": split_facts(graph["facts"])[0]} if "facts" in graph else graph
        values[safe_name(f"graphs/{i:02d}-{name}.json")] = plain
    out = {name: canonical_json(value) for name, value in values.items()}
    if contents.tokenizer is not None:
        for name in TOKENIZER_FILES:
            source = contents.tokenizer / name
            if source.is_file() and source.stat().st_size <= _TOKENIZER_BYTES:
                out[name] = source.read_bytes()
    return out


def split_facts(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts that a run needs, facts about where the model came from); paths are left out."""
    neutral = {k: v for k, v in facts.items() if k in NEUTRAL_FACTS}
    other = {k: v for k, v in facts.items() if k not in NEUTRAL_FACTS and k != "tokenizer"}
    return neutral, other


def versions() -> dict[str, str]:
    """Versions of what computes and stores."""
    out = {"python": platform.python_version()}
    for name in ("llmc", "torch", "safetensors", "tokenizers", "transformers"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


# ** reading **


def load(path: str | Path, *, verify: bool | None = None) -> Loaded:
    """Read an artefact.

    Args:
        verify: True hashes every file, False reads headers and JSON only (``llmc inspect``), None
            hashes the weights too unless they exceed 1 GiB. JSON is always hashed.
    Raises:
        ModelError: whatever is missing, extra, changed or misshapen, by name.
    """
    root = Path(path)
    manifest = open_manifest(root)
    weights = sorted({t.file for t in manifest.tensors.values()})
    if verify is None:
        verify = sum(manifest.files[n].size for n in weights) <= _HASHED_BY_DEFAULT
    if verify:
        for name in manifest.files:
            check_file(root, name, manifest.files[name])
    for message in check_headers(root, manifest.tensors):
        raise ModelError(message, where=str(root))
    texts = {
        name: _listed_json(root, manifest, name)
        for name in ("program.json", "schemes.json", "provenance.json", "plan.json", "report.json",
                     "run.json")
    }  # fmt: skip
    program = _program(root, manifest, texts["program.json"], texts["provenance.json"])
    graphs = sorted(n for n in manifest.files if n.startswith("graphs/"))
    tokenizer = root if "tokenizer.json" in manifest.files else None
    if tokenizer is not None:
        program.facts["tokenizer"] = str(root)
    return Loaded(
        root, program, manifest, texts["schemes.json"], texts["plan.json"], texts["report.json"],
        texts["run.json"], tuple(n.removeprefix("graphs/").removesuffix(".json") for n in graphs),
        tokenizer,
    )  # fmt: skip


def is_artefact(path: str | Path) -> bool:
    """Whether a folder looks like an artefact (it has a manifest); nothing is checked."""
    return (Path(path).expanduser() / manifests.NAME).is_file()


def check_replaceable(path: Path) -> None:
    """Refuse to throw away a folder that is no artefact: a model, say, or somebody's home.

    Raises:
        UsageError: ``path`` is a folder with something else in it.
    """
    if path.is_dir() and any(path.iterdir()) and not is_artefact(path):
        raise UsageError(
            f"expected an artefact to replace, found a folder of something else at {path}",
            hint="--force replaces artefacts only; choose a new folder",
        )


def open_manifest(root: Path) -> Manifest:
    """The manifest, after checking that the folder holds the listed files and no others.

    Raises:
        ModelError: naming the first file that is missing, extra, a link, or of another size.
    """
    if not root.is_dir():
        raise ModelError(f"expected an artefact's folder, found none at {root}")
    manifest = manifests.read_manifest(read_bytes(root, manifests.NAME, manifests.MANIFEST_BYTES))
    found = set(all_files(root)) - {manifests.NAME}
    listed = set(manifest.files)
    for name in sorted(listed - found):
        raise ModelError(f"expected file {name}, found none", where=str(root))
    for name in sorted(found - listed):
        raise ModelError(f"expected no file {name}, the manifest lists none", where=str(root))
    for name, record in manifest.files.items():
        size = checked_path(root, name, FILE_BYTES).stat().st_size
        if size != record.size:
            raise ModelError(
                f"expected {name} of {record.size} bytes, found {size}", where=str(root)
            )
    return manifest


def check_file(root: Path, name: str, record: File) -> None:
    """Raises ModelError unless a file's bytes have the listed hash."""
    if file_sha256(checked_path(root, name, FILE_BYTES)) != record.sha256:
        raise ModelError(f"expected {name} as it was written, found changed bytes", where=str(root))


def _listed_json(root: Path, manifest: Manifest, name: str) -> Any:
    if name not in manifest.files:
        raise ModelError(f"expected file {name}, the manifest lists none", where=str(root))
    data = read_bytes(root, name)
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise ModelError(f"expected {name} as it was written, found changed bytes", where=str(root))
    return parse_json(data, name)


def _program(root: Path, manifest: Manifest, body: Any, origin: Any) -> Program:
    program = from_json(body, ArtefactWeights(root, manifest.tensors))
    stored = _stored(program)
    for name in sorted(set(stored) ^ set(manifest.tensors)):
        where = "the program" if name in stored else "the manifest"
        raise ModelError(f"expected tensor {name} in both, found it only in {where}")
    for name, param in stored.items():
        record = manifest.tensors[name]
        if (list(param.shape), short(param.dtype)) != (record.shape, record.dtype):
            raise ModelError(
                f"expected tensor {name} {short(param.dtype)}{list(param.shape)} as in the "
                f"program, found {record.dtype}{record.shape}",
                where=record.file,
            )
    if not isinstance(origin, dict) or set(origin) != {"program", "facts"}:
        raise ModelError("expected fields program and facts", where="provenance.json")
    attach(program, origin["program"])
    program.facts |= split_facts(check_facts(origin["facts"]))[1]
    try:
        verify_program(program)
    except VerifierError as e:
        raise ModelError(f"expected a lawful program, found {e}", where="program.json") from None
    if program.exits is not None:
        # A few numbers, so they are checked now and not when the first token leaves.
        classifier_of(program.exits, program.weights)
    load_all(program)
    check_rotations(program)
    check_latents(program)
    return program
