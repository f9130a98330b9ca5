"""Where a node comes from, for people: module path and source line, never a machine path."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# Frames of the tracer and of layers in torch say less than the model's own line.
_INNER = ("torch/", "transformers/activations.py", "transformers/integrations/")


def module_path(node: fx.Node, prefix: str = "") -> str:
    """The innermost module that made the node, e.g. ``model.layers.0.mlp``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] or path
    path = path.removeprefix("L['self']").lstrip(".")
    if path == prefix:
        return ""
    return path.removeprefix(prefix + ".") if prefix else path


def source_line(node: fx.Node) -> str:
    """``package/file.py:line`` of the innermost model frame, else of the innermost frame."""
    frames = [
        (_relative(file), line)
        for file, line in _FRAME.findall(node.meta.get("stack_trace") or "")
        if not file.startswith("<") and "/compiler/capture/" not in file
    ]
    if not frames:
        return ""
    own = [f for f in frames if not f[0].startswith(_INNER)]
    file, line = (own or frames)[-1]
    return f"{file}:{line}"


def _relative(file: str) -> str:
    for mark in ("/site-packages/", "/dist-packages/"):
        _, found, rest = file.rpartition(mark)
        if found:
            return rest
    return file.rpartition("/")[2]
