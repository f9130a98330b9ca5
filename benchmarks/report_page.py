"""How large the report of a 32-layer model is, and how long a headless Chromium takes to open it.

    python benchmarks/report_page.py

The model is random, 32 decoder blocks of width 64 compiled by `smooth,w4:group=32`; size grows
with the layers and not with their width. A page that frames the report tells the time from asking
for it to its load event; the wall time of the whole browser, its start and the printed tree
included, is given beside it and is the one that is judged. The page forbids scripts and fetches to
the browser that opens it, and the browser's tree must be the one that is written in the file.
Writes ``results/report.json``. Without a browser the second part is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llmc
from llmc.compiler.cli.report import page_of
from llmc.compiler.pipeline.zoo import decoder

BYTES, SECONDS = 3_000_000, 1.0
PASSES = "smooth,w4:group=32"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FORBIDS = """content="default-src 'none'; style-src 'unsafe-inline'">"""
FRAME = (
    "<!DOCTYPE html><title></title><script>var began = performance.now()</script>"
    '<iframe src="report.html" width="1280" height="900" '
    'onload="document.title = performance.now() - began"></iframe>'
)


def written(place: Path, layers: int) -> str:
    """Compile the model and write its report; returns the page."""
    program = decoder(hidden=64, inner=128, heads=4, kv=2, size=16, blocks=layers)
    tokens = torch.randint(0, 20, (4, 32), generator=torch.Generator().manual_seed(0))
    done = llmc.compile(program, passes=PASSES, calibration=tokens, samples=4, length=32)
    done.save(place / "deep")
    page = page_of(place / "deep")
    (place / "report.html").write_text(page, encoding="utf-8")
    (place / "frame.html").write_text(FRAME, encoding="utf-8")
    return page


def opened(browser: str, place: Path, name: str) -> tuple[str, float]:
    """The tree that the browser made of a file, and seconds of its whole run."""
    began = time.perf_counter()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu",
               f"--user-data-dir={place / 'profile'}", "--dump-dom",
               (place / name).as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout, time.perf_counter() - began


def shape(source: str) -> list[str]:
    """The tags that open, in order, sources of kernels left out."""
    return re.findall(r"<([a-z0-9]+)", re.sub(r"<pre>.*?</pre>", "", source, flags=re.S))


def main() -> int:
    """Measure; exit 4 when the page is larger or slower than it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/report.json")
    args = parser.parse_args()
    browser = next((b for name in BROWSERS if (b := shutil.which(name))), None)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        page = written(place, args.layers)
        data: dict[str, Any] = {
            "command": "python benchmarks/report_page.py", "layers": args.layers, "passes": PASSES,
            "bytes": len(page.encode()), "bytes_limit": BYTES, "python": platform.python_version(),
        }  # fmt: skip
        met = data["bytes"] < BYTES
        if browser is None:
            print(f"no browser of {', '.join(BROWSERS)}: opening was not measured", file=sys.stderr)
        else:
            walls, loads = [], []
            opened(browser, place, "report.html")  # makes the profile
            for _ in range(args.repeats):
                tree, wall = opened(browser, place, "report.html")
                walls.append(wall)
                framed, _ = opened(browser, place, "frame.html")
                loads.append(float(framed.partition("<title>")[2].partition("<")[0]))
            version = subprocess.run([browser, "--version"], capture_output=True, text=True)
            data |= {
                "browser": version.stdout.strip(), "repeats": args.repeats,
                "load_ms": round(statistics.median(loads), 1),
                "load_ms_worst": round(max(loads), 1),
                "seconds": round(statistics.median(walls), 3),
                "seconds_fastest": round(min(walls), 3), "seconds_limit": SECONDS,
                "tags": len(shape(tree)), "tree_as_written": shape(tree) == shape(page),
                "forbids_scripts_and_fetches": FORBIDS in page,
            }  # fmt: skip
            met = met and data["seconds"] < SECONDS and data["tree_as_written"]
            met = met and data["forbids_scripts_and_fetches"]
    print(json.dumps(data, indent=1))
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if met else 4


if __name__ == "__main__":
    sys.exit(main())
