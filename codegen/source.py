"""A rendered kernel becomes a file in the user's cache, and that a jit function."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..compiler.ir.errors import ResourceError
from .render import Rendered


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/llmc/kernels` (or under ~/.cache), private to the user.

    ResourceError when it cannot be made, or belongs to somebody else or is writable by others:
    what lies there is executed.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "llmc" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise ResourceError(f"cannot make the kernel cache: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ResourceError(
            "expected a kernel cache owned and writable by you alone", where=str(folder)
        )
    return folder


def source_file(rendered: Rendered) -> Path:
    """The cache file that holds exactly this source; written when absent or different."""
    path = cache_folder() / f"{rendered.name}_{rendered.digest[:24]}.py"
    if path.is_file() and path.read_text() == rendered.source:
        return path
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(rendered.source)
    os.replace(temporary, path)
    return path


@functools.cache
def function(rendered: Rendered) -> Any:
    """The jit function of a rendered kernel, imported from its cache file."""
    path = source_file(rendered)
    name = f"llmc_kernel_{rendered.digest[:24]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ResourceError("cannot load a kernel source", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return getattr(module, rendered.name)
