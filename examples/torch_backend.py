"""A transformers model through ``torch.compile(model, backend="llmc")``: speed, size and error.

    python examples/torch_backend.py
    python examples/torch_backend.py --model ./model --passes smooth,w4 --target cpu

The model stays as it is; its compressed weights live in the compiled graph. Calling it with other
shapes makes torch compile again, and the codes stay the same: they belong to the parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llmc.compiler.backend import compressed
from llmc.compiler.pipeline.data import Tokenizer, read_stream

HERE = Path(__file__).resolve().parent


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call after one that warms up."""
    call()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[repeats // 2]


def fingerprint(held: dict[str, dict[str, torch.Tensor]]) -> str:
    """A short hash over every code, scale and position."""
    total = hashlib.sha256()
    for name, parts in sorted(held.items()):
        for part, tensor in sorted(parts.items()):
            total.update(f"{name}.{part}".encode())
            total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def main() -> None:
    """Compile, compare with eager, recompile for other lengths, show that the codes stay."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "pylm")
    parser.add_argument("--passes", default="smooth,w4,prune24")
    parser.add_argument("--target", default="reference", choices=["reference", "cpu", "triton"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = Tokenizer(args.model)
    text = read_stream(None, tokenizer).tokens
    ids = text[-args.length :].view(1, -1)

    fast = torch.compile(
        model,
        backend="llmc",
        options={
            "passes": args.passes, "calibration": text[: -4 * args.length],
            "samples": args.samples, "target": args.target,
        },
    )  # fmt: skip
    with torch.inference_mode():
        began = time.perf_counter()
        ours = fast(ids, use_cache=False).logits
        print(
            f"compiled in {time.perf_counter() - began:.1f} s: {args.passes} on {args.model.name}"
        )
        eager = model(ids, use_cache=False).logits
        error = float((ours - eager).norm() / eager.norm())
        same = float((ours.argmax(-1) == eager.argmax(-1)).float().mean())
        print(f"error    {error:.4f} of the logits' norm, top-1 agreement {same:.1%}")

        held = compressed(model)
        before = sum(p.nbytes for n, p in model.named_parameters() if n in held)
        after = sum(t.nbytes for parts in held.values() for t in parts.values())
        print(f"size     {before:,} -> {after:,} bytes for {len(held)} rewritten parameters")

        slow = seconds(lambda: model(ids, use_cache=False), args.repeats)
        quick = seconds(lambda: fast(ids, use_cache=False), args.repeats)
        print(f"speed    eager {args.length / slow:,.0f} tokens/s, "
              f"llmc ({args.target}) {args.length / quick:,.0f} tokens/s")  # fmt: skip

        first = fingerprint(held)
        for length in (args.length // 2, args.length - 3):
            fast(ids[:, :length], use_cache=False)
        again = fingerprint(compressed(model))
        print(f"codes    {first} before and {again} after compiling for other lengths")
        if first != again:
            raise SystemExit("the codes changed")


if __name__ == "__main__":
    main()
