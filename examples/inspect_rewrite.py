"""Look at a rewrite: the graph before and after a pass, as Python, and why a place was refused.

    python examples/inspect_rewrite.py
    python examples/inspect_rewrite.py --model ./model --passes prune24,w4

Nothing is loaded or solved: planning runs the very rewrites that compiling keeps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llmc
from llmc.compiler.report.difference import changes, hunks, unified

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Capture, plan, print the difference, the rewritten block as Python, and the refusals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "pylm")
    parser.add_argument("--passes", default="w4,prune24")
    args = parser.parse_args()

    plan = llmc.plan(args.model, args.passes)
    found = changes(plan.source, plan.program)
    for hunk in hunks(found):  # blocks that changed alike are told once
        print(unified(hunk) + "\n")

    python = plan.program.print_python(args.passes)
    start = python.index("def forward")
    print("\n".join(python[start:].splitlines()[:40]))
    print("    ...\n")

    for refusal in plan.refusals:
        print(refusal)


if __name__ == "__main__":
    main()
