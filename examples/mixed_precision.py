"""Bits where they are needed: so many stored bits per weight, spread by measured sensitivity.

    python examples/mixed_precision.py
    python examples/mixed_precision.py --model ./model --bits 4.5 --samples 128 --length 2048

The same question may be asked by size (``size="40%"``) or by quality (``budget="ppl+2%"``).
"""

from __future__ import annotations

import argparse
from collections import Counter
from math import prod
from pathlib import Path

import llmc

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Compress once evenly and once by choice, at a few more bits; show who got them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "pylm")
    parser.add_argument("--bits", type=float, default=3.5, help="stored bits per weight")
    parser.add_argument("--candidates", default="w2,w3,w4,w6")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    same = {"samples": args.samples, "length": args.length}

    even = llmc.compile(args.model, "smooth,w3", **same)
    chosen = llmc.compile(
        args.model, "smooth,w4", bits=args.bits, candidates=args.candidates, **same
    )
    for name, model in (("even w3", even), (f"{args.bits} bits", chosen)):
        rows = model.report["sites"]
        loss = sum(r["loss"] for r in rows) / len(rows)
        bits = 8 * sum(r["bytes_after"] for r in rows) / sum(prod(r["shape"]) for r in rows)
        print(f"{name:<9} {bits:.3f} bits per weight, "
              f"mean loss of a layer's output {loss:.2e}")  # fmt: skip
    print("chosen:")
    for (role, scheme), count in sorted(
        Counter((r["role"], r["scheme"]) for r in chosen.report["sites"]).items()
    ):
        print(f"  {role:<5} {scheme:<14} {count} weights")


if __name__ == "__main__":
    main()
