"""A pass of your own: one file, found by LLMC_PASSES, no other change anywhere.

    python examples/own_pass.py
    LLMC_PASSES=examples/own_pass.py llmc compile ./model --passes smooth,w48 -o out

The pass is the class below. It is then listed by `llmc passes`, takes its knobs on the command
line, is planned, sorted and solved with the others, traced, reported, and tested by
`LLMC_PASSES=examples/own_pass.py pytest tests/passes/test_examples.py -k w48`.
"""

from dataclasses import dataclass

from llmc.compiler.ir.scheme import Codes
from llmc.compiler.pipeline.base import knob
from llmc.compiler.pipeline.coding import GroupedCoding, group_knob


@dataclass(frozen=True)
class Careful(GroupedCoding):
    """W → codes of ``wide`` bits where attention reads or writes, of 4 bits everywhere else."""

    variants = {"w48": {}}
    source = "examples/own_pass.py"
    wide: int = knob(8, "bits of the weights around attention", lo=4, hi=8)
    group: int | str | None = group_knob(64)

    def codes(self, site):
        bits = self.wide if site.role in ("q", "k", "v", "o") else 4
        return Codes(bits, self.grouped(site))


def main() -> None:
    """Show that the commands know the pass: its knobs, its sites, its result, its trace."""
    import os
    import subprocess
    import sys
    import tempfile
    from pathlib import Path

    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LLMC_PASSES": str(here), "LLMC_TRACE": f"{folder}/trace"}
        model, out = str(here.parent / "pylm"), f"{folder}/out"
        for command in (
            ["passes", "w48"],
            ["compile", model, "--passes", "smooth,w48:wide=6", "--samples", "4", "--length", "64",
             "-o", out],
            ["report", out, "-o", f"{folder}/report.html"],
        ):  # fmt: skip
            print("$ llmc", *(Path(c).name if "/" in c else c for c in command), flush=True)
            llmc = [sys.executable, "-m", "llmc.compiler.cli", *command]
            subprocess.run(llmc, env=environment, check=True)
            print(flush=True)
        print("trace:", *sorted(p.name for p in (Path(folder) / "trace").iterdir()))


if __name__ == "__main__":
    main()
