"""Where the weights of an ONNX file lie: in files of its own folder, and nowhere else.

A file names what holds its tensors by a path, an offset and a length, and a runtime maps whatever
they say; so they are looked at before anything reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ...ir.errors import ModelError

_HINT = "nothing of it was read; export the model again"


def check_data(path: Path) -> None:
    """Check every external tensor of the ONNX file ``path``.

    Raises:
        ModelError: a place that is no plain file of the same folder (an absolute path, one through
        "..", a link), or bytes beyond the end of a file; the tensor is named.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ModelError("expected an ONNX file, found one that cannot be read", where=str(path),
                         hint=_HINT) from error  # fmt: skip
    for tensor in _tensors(model.graph):
        if onnx.external_data_helper.uses_external_data(tensor):
            told = {e.key: e.value for e in tensor.external_data}
            _check(path, tensor.name, told)


def _tensors(graph: Any) -> Iterator[Any]:
    """Of a graph and those inside it: initializers and constants."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for inner in ([attribute.g] if attribute.HasField("g") else []) + [*attribute.graphs]:
                yield from _tensors(inner)


def _check(path: Path, name: str, told: dict[str, str]) -> None:
    place = told.get("location", "")
    parts = PurePosixPath(place).parts
    if not parts or place.startswith("/") or ".." in parts or "\\" in place or ":" in place:
        _refuse(path, name, "a file of the same folder", repr(place))
    file = path.parent
    for part in parts:
        file = file / part
        if file.is_symlink():
            _refuse(path, name, "a file of the same folder", f"a link, {place}")
    if not file.is_file():
        _refuse(path, name, "a file of the same folder", f"none called {place}")
    size = file.stat().st_size
    spans = [told.get("offset", "0"), told.get("length", str(size))]
    if not all(s.isdecimal() for s in spans) or sum(map(int, spans)) > size:
        found = f"offset {spans[0]}, length {spans[1]} of {size}"
        _refuse(path, name, f"bytes inside {place}", found)


def _refuse(path: Path, tensor: str, expected: str, found: str) -> None:
    raise ModelError(f"{tensor}: expected {expected}, found {found}", where=str(path), hint=_HINT)
