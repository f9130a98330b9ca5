"""Triton's interpreter is chosen when it is imported, so kernels run in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

QUICKLY = str(Path(__file__).with_name("quickly.py"))


def interpreted(script: str, cache: Path, *arguments: str) -> Any:
    """What a test file, run as a script under the interpreter, prints in its last line as JSON.

    cache: where rendered sources are kept.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(cache)}
    run = subprocess.run(
        [sys.executable, QUICKLY, script, *arguments], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])
