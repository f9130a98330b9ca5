"""``llmc run`` and ``llmc verify``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..ir.errors import ModelError, UsageError
from .output import Out, examples, output_options
from .progress import waiting

if TYPE_CHECKING:
    from ..model import Model

TARGETS = ("reference", "cpu", "triton")
F = TypeVar("F")


def lowering_options(target: str, dtype: str = "f32") -> Callable[[F], F]:
    """Add the options that say what a graph is lowered for; with the default target and dtype."""

    def add(command: F) -> F:
        made: Any = command
        for option in (
            click.option("--trust-remote-code", is_flag=True,
                         help="Run modelling code that lies in the model's folder."),
            click.option("--resident", type=click.Choice(["packed", "dense"]), default="packed",
                         show_default=True, help="Decode weights in every call, or once (memory)."),
            click.option("--compiled", is_flag=True,
                         help="On the CPU, compile int4 products for this machine first: faster "
                         "from a few tokens on, seconds once, kept in the cache."),
            click.option("--dtype", type=click.Choice(["auto", "f32", "bf16", "f16"]),
                         default=dtype, show_default=True,
                         help="In which the graph computes; auto: on the CPU the one that was "
                         "measured to be faster, elsewhere f32."),
            click.option("--target", type=click.Choice(TARGETS), default=target,
                         show_default=True,
                         help="What the graph is lowered for: plain torch (the oracle), torch's "
                         "int4 and int8 kernels, or Triton on a GPU."),
        ):  # fmt: skip
            made = option(made)
        return made

    return add


def settled(given: dict[str, Any], out: Out) -> dict[str, Any]:
    """The values of :func:`lowering_options` with a dtype in place of ``auto``; the reason said."""
    if given["compiled"]:
        from ...codegen.cpu.compiled import check_available

        if given["target"] != "cpu":
            raise UsageError(f"--compiled: expected --target cpu, found {given['target']}")
        check_available()
    if given["dtype"] != "auto":
        return given
    if given["target"] != "cpu":
        return given | {"dtype": "f32"}
    from ...codegen.cpu.dtypes import compute_dtype
    from ..ir.types import short

    dtype, why = compute_dtype()
    out.note(f"computes in {short(dtype)}: {why}; --dtype says otherwise")
    return given | {"dtype": short(dtype)}


def lowering_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The values of :func:`settled` as arguments of ``api.open_any``."""
    from ..ir.types import DTYPES

    return given | {"dtype": DTYPES[given["dtype"]]}


@click.command(epilog=examples(
    'llmc run out --prompt "def main("',
    'llmc run out --prompt "import os" --prompt "class A" --max-new-tokens 32',
    'llmc run ./model --prompt "def" --temperature 0.8 --top-p 0.9 --seed 7',
))  # fmt: skip
@click.argument("source", metavar="ARTEFACT_OR_MODEL")
@click.option("--prompt", "prompts", multiple=True, required=True,
              help="Text to continue; may be repeated.")  # fmt: skip
@click.option("--max-new-tokens", type=int, default=64, show_default=True,
              help="Most tokens to write; the end token stops earlier.")  # fmt: skip
@click.option("--greedy", is_flag=True, help="Take the likeliest token (the default).")
@click.option("--temperature", type=float, default=None,
              help="Above 0: draw from the softmax of logits / temperature.")  # fmt: skip
@click.option("--top-k", type=int, default=None, help="Draw from the k likeliest tokens.")
@click.option("--top-p", type=float, default=None,
              help="Draw from the smallest set of tokens of that probability.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@lowering_options("cpu", "auto")
@output_options
def run_command(
    source: str, prompts: tuple[str, ...], max_new_tokens: int, greedy: bool,
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int, out: Out,
    **lowering: Any,
) -> None:  # fmt: skip
    """Continue prompts, with the KV cache that the compiler adds; text streams to stdout."""
    if greedy and (temperature is not None or top_k is not None or top_p is not None):
        raise UsageError("expected --greedy alone, found --temperature, --top-k or --top-p with it")
    if temperature is None:
        temperature = 1.0 if top_k is not None or top_p is not None else 0.0
    from .. import api
    from ..runtime.generate import Sampling, TextStream

    sampling = Sampling(temperature, top_k, top_p, seed)
    sampling.check()
    lowering = settled(lowering, out)
    with waiting(f"loading {source}", out):
        model = api.open_any(source, **lowering_arguments(lowering))
        runner = model.generator
    if model.tokenizer is None:
        raise UsageError(f"expected a tokenizer.json in {source}, found none")
    if not runner.cached:
        out.note(f"no KV cache, each token reads the whole text: {model.why_no_cache()}")
    tokenizer = model.tokenizer
    shown = TextStream(tokenizer)
    live = out.human and len(prompts) == 1
    times: list[float] = []

    def on_token(row: int, token: int) -> None:
        if live:
            out.text("" if times else prompts[0], newline=False)
            out.text(shown.push(token), newline=False)
        times.append(time.perf_counter())

    ids = [tokenizer.encode(p) for p in prompts]
    began = time.perf_counter()
    made = model.generate(
        ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, on_token=on_token, on_note=out.note,
    )  # fmt: skip
    took = time.perf_counter() - began
    texts = [tokenizer.decode(row) for row in made]
    if live:
        out.text(("" if times else prompts[0]) + shown.rest())
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            out.text(f"--- {prompt}{text}")
    count = sum(len(row) for row in made)
    out.note(
        f"{count} tokens in {took:.2f} s ({count / max(took, 1e-9):.1f} tokens/s, "
        f"target {lowering['target']})"
    )
    used = model.layers_used
    depths = [n for row in used or () for n in row]
    if used is not None:
        out.note(_layers(depths, model))
    out.data("run", {
        "source": source, "target": lowering["target"], "dtype": lowering["dtype"],
        "cached": runner.cached, "seed": seed,
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seconds": took,
        "first_token_seconds": times[0] - began if times else None,
        "layers_per_token": sum(depths) / len(depths) if depths else None,
        "layers_used": used,
        "texts": [
            {"prompt": p, "prompt_tokens": len(i), "text": t, "tokens": row}
            for p, i, t, row in zip(prompts, ids, texts, made, strict=True)
        ],
    })  # fmt: skip


def _layers(depths: list[int], model: Model) -> str:
    """Layers used per new token, from the blocks that were run."""
    from ..analysis.blocks import is_block

    blocks = sum(is_block(s.name) for s in model.program.segments)
    mean = sum(depths) / max(len(depths), 1)
    return f"{mean:.2f} of {blocks} layers used per token (prompts run at full depth)"


@click.command(epilog=examples("llmc verify out", "llmc verify out --json"))
@click.argument("folder", metavar="ARTEFACT", type=click.Path(path_type=Path))
@output_options
def verify_command(folder: Path, out: Out) -> None:
    """Check an artefact: every hash, shape, op and number; exit 3 with the findings."""
    from ..runtime.verify import verify

    with waiting(f"verifying {folder}", out):
        found = verify(folder)
    for finding in found:
        out.text(str(finding))
    if not found:
        out.text(f"{folder} is sound")
    out.data("verify", {
        "folder": str(folder), "sound": not found,
        "findings": [{"check": f.check, "message": f.message} for f in found],
    })  # fmt: skip
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ModelError(f"expected a sound artefact at {folder}, found: {found[0]}{more}")
