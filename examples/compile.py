"""Compress a model from Python, save it, load it back, let it write.

python examples/compile.py --out out/pylm
python examples/compile.py --model ./model --passes smooth,w4 --calibration text.txt --out out/m
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import llmc

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Plan, compile, save, load, compare, generate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "pylm")
    parser.add_argument("--passes", default="smooth,w4,prune24")
    parser.add_argument("--calibration", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    program = llmc.capture(args.model)  # a graph; no weight is read yet
    plan = llmc.plan(program, args.passes)
    bits = plan.bits_per_weight()
    print(f"plan: {len(plan.rows())} weights at {bits:.3f} bits, {len(plan.refusals)} refusals")
    for refusal in plan.refusals:
        print(f"  {refusal}")

    small = llmc.compile(
        args.model, passes=args.passes, calibration=args.calibration, samples=args.samples,
        length=args.length,
    )  # fmt: skip
    worst = max(small.records, key=lambda r: r["loss"])
    print(f"solved: worst loss {worst['loss']:.2e} at {worst['site']} ({worst['scheme']})")
    small.save(args.out, force=True)

    back = llmc.load(args.out)
    ids = torch.arange(8).view(1, 8)
    print(f"saved and loaded logits equal: {torch.equal(small(ids), back(ids))}")
    print(args.prompt + str(back.generate(args.prompt, max_new_tokens=32)))


if __name__ == "__main__":
    main()
