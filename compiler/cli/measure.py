"""``llmc eval``: how good, how big, how fast."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import GateError, UsageError
from .kernels import show_ways
from .output import Out, examples, output_options
from .progress import Progress, waiting
from .use import lowering_arguments, lowering_options, settled

if TYPE_CHECKING:
    from ..model import Model
    from ..pipeline.data import Stream
    from ..runtime.evaluate import Evaluation, Speaker
    from ..runtime.executor import Runner

DEFAULT_WINDOW = 2048
# A tensor that takes more memory than this times its stored bytes is listed.
GROWN = 1.1


@click.command(epilog=examples(
    "llmc eval out --data text.txt",
    "llmc eval out --data text.txt --baseline ./model",
    "llmc eval out --data text.txt --baseline ./model --min-recovery 0.95 --json",
))  # fmt: skip
@click.argument("source", metavar="ARTEFACT_OR_MODEL")
@click.option("--data", required=True, type=click.Path(),
              help="Held-out text (.txt, .jsonl) or tokens (.npy, .safetensors).")  # fmt: skip
@click.option("--baseline", default=None, help="The model to compare with, usually the original.")
@click.option("--window", type=int, default=None,
              help="Tokens per window.  [default: 2048, or the model's context]")  # fmt: skip
@click.option("--max-windows", type=int, default=None, help="Only the first windows.")
@click.option("--batch", type=int, default=1, show_default=True, help="Windows run at once.")
@click.option("--min-recovery", type=float, default=None,
              help="Exit 4 when baseline perplexity / perplexity is below this.")  # fmt: skip
@click.option("--speed/--no-speed", default=True, show_default=True,
              help="Time prefill and decode as well.")  # fmt: skip
@click.option("--prompt-tokens", type=int, default=128, show_default=True,
              help="Tokens of the timed prefill.")  # fmt: skip
@click.option("--new-tokens", type=int, default=32, show_default=True,
              help="Tokens of the timed decode.")  # fmt: skip
@lowering_options("reference")
@output_options
def eval_command(
    source: str, data: str, baseline: str | None, window: int | None, max_windows: int | None,
    batch: int, min_recovery: float | None, speed: bool, prompt_tokens: int, new_tokens: int,
    out: Out, **lowering: Any,
) -> None:  # fmt: skip
    """Perplexity by the papers' protocol, divergence from a baseline, size, speed and memory.

    One token stream, windows that do not overlap, the tail dropped. Two models are compared by a
    paired bootstrap over the same windows. A model with early exits, or with a cache of codes, is
    run token by token, as it writes, and compared with itself without them.
    """
    if min_recovery is not None and baseline is None:
        raise UsageError("--min-recovery: expected a --baseline to recover, found none")
    for name, value in (("--batch", batch), ("--prompt-tokens", prompt_tokens),
                        ("--new-tokens", new_tokens), ("--max-windows", max_windows)):  # fmt: skip
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, found {value}")
    from .. import api
    from ..pipeline.data import read_stream
    from ..runtime.evaluate import compare, peak_rss
    from ..runtime.stepwise import Stepwise

    lowering = settled(lowering, out)
    with waiting(f"loading {source}", out):
        model = api.open_any(source, **lowering_arguments(lowering))
    stream = read_stream(data, model.tokenizer)
    size = _window(model) if window is None else window
    other: Model | None = None
    if baseline is not None:
        with waiting(f"loading {baseline}", out):
            other = api.open_any(baseline, **lowering_arguments(lowering))
        _same_tokens(model, other)
    speaker = _speaker(model)
    beside = None if other is None else _speaker(other)
    mine, theirs = _evaluate(speaker, stream, size, batch, max_windows, out, beside)
    result: dict[str, Any] = {
        "source": source,
        "target": lowering["target"],
        "dtype": lowering["dtype"],
        "quality": mine.to_json(),
    }
    result["size"] = _size(model)
    if isinstance(speaker, Stepwise):
        result |= speaker.to_json(mine)
    if other is not None and theirs is not None:
        versus = compare(mine, theirs)
        recovery = theirs.perplexity / mine.perplexity
        result["baseline"] = {
            "source": baseline, "quality": theirs.to_json(), "size": _size(other),
            "comparison": versus.to_json(), "recovery": recovery,
        }  # fmt: skip
    if speed:
        result["speed"] = _speed(model.generator, stream, prompt_tokens, new_tokens)
        if "exits" in result:
            result["exits"]["full_speed"] = _speed(
                model.full_generator, stream, prompt_tokens, new_tokens
            )
        if other is not None:
            result["baseline"]["speed"] = _speed(other.generator, stream, prompt_tokens, new_tokens)
    result["peak_rss_bytes"] = peak_rss()
    _tell(result, out)
    if out.verbose and lowering["target"] == "cpu":
        from ...codegen.survey import survey
        from ...codegen.targets import BANDWIDTH

        show_ways(survey(model.program, "cpu", 1, "bf16", BANDWIDTH)["fused"], out)
    out.data("eval", result)
    if min_recovery is not None:
        found = result["baseline"]["recovery"]
        # Not "found < wanted": a perplexity that is not a number must fail the gate too.
        if not found >= min_recovery:
            raise GateError(
                f"expected a recovery of at least {min_recovery:g}, found {found:.4f}",
                where=source, hint="more bits, smaller groups or fewer zeros",
            )  # fmt: skip


def _window(model: Model) -> int:
    context = model.program.facts.get("context")
    return min(DEFAULT_WINDOW, context) if isinstance(context, int) else DEFAULT_WINDOW


def _same_tokens(a: Model, b: Model) -> None:
    """The two must read one and the same token stream."""
    if a.tokenizer is None or b.tokenizer is None or a.tokenizer.sha256 == b.tokenizer.sha256:
        return
    raise UsageError(
        "expected a baseline with the same tokenizer.json, found another one",
        hint="perplexities of different tokens cannot be compared",
    )


def _speaker(model: Model) -> Speaker:
    """The model as it is evaluated: whole windows at once, or token by token where it may leave."""
    from ..runtime.exits import ExitRunner
    from ..runtime.stepwise import Stepwise

    writes = model.program.caches and model.generator.cached
    if writes or (model.program.exits is not None and isinstance(model.generator, ExitRunner)):
        return Stepwise(model.generator, model.runner)
    return model.runner


def _evaluate(
    model: Speaker, stream: Stream, window: int, batch: int, limit: int | None, out: Out,
    other: Speaker | None,
) -> tuple[Evaluation, Evaluation | None]:  # fmt: skip
    """The model's evaluation, and the baseline's where there is one: each runs once."""
    from ..runtime.evaluate import evaluate, evaluate_pair

    with Progress("evaluating", out) as progress:

        def step(done: int, total: int) -> None:
            if not progress.total:
                progress.steps(total)
            progress.at(done, "windows")

        if other is None:
            alone = evaluate(model, stream, window, batch=batch, limit=limit, progress=step)
            return alone, None
        return evaluate_pair(model, other, stream, window, batch=batch, limit=limit, progress=step)


def _size(model: Model) -> dict[str, Any]:
    from ..runtime.sizes import sizes

    memory = model.runner.memory_report()
    params = model.runner.program.params
    grown = [
        {"tensor": name, "names": list(params[name].names) if name in params else [],
         "stored": params[name].bytes if name in params else 0, "resident": count}
        for name, count in (memory.weights | memory.computed).items()
        if name not in params or count > GROWN * params[name].bytes
    ]  # fmt: skip
    return sizes(model.program).to_json() | {
        "resident_bytes": memory.total, "resident_above_stored": grown,
    }  # fmt: skip


def _speed(runner: Runner, stream: Stream, prompt: int, new: int) -> dict[str, Any] | None:
    from ..runtime.evaluate import speed

    if not runner.cached:
        return None
    return speed(runner, stream.tokens, prompt=prompt, new=new).to_json()


def _tell_exits(exits: dict[str, Any], speed: dict[str, Any] | None, out: Out) -> None:
    """What leaving early did: layers used, agreement, and speed with the exits on and off."""
    out.text(
        f"early exits ({exits['rule']} >= {exits['threshold']:.4g}): "
        f"{exits['blocks_per_token']:.2f} of {exits['blocks']} layers per token "
        f"({exits['decoded_tokens']:,} decoded, prompts at full depth), agreement with the full "
        f"model {exits['agreement']:.2%}, its perplexity {exits['full_perplexity']:.5g}"
    )
    total = max(exits["decoded_tokens"], 1)
    shares = [f"{n}: {c / total:.1%}" for n, c in exits["tokens_by_blocks"].items() if c]
    out.text("tokens by layers used  " + "  ".join(shares))
    full = exits.get("full_speed")
    if speed and full:
        on, off = (s["decode_tokens_per_second"] for s in (speed, full))
        out.text(
            f"decode {on:.4g} tokens/s ({speed['blocks_per_token']:.2f} layers) against {off:.4g} "
            f"with exits off: x{on / off:.3f}"
        )


def _tell_cache(cache: dict[str, Any], window: int, out: Out) -> None:
    """What the cache takes, and what it costs."""
    from ..report.text import size

    kinds, bits = (", ".join(map(str, cache[k])) for k in ("kinds", "bits"))
    ratio = cache["plain_bytes"] / max(cache["bytes"], 1)
    out.text(
        f"KV cache ({kinds}, {bits} bits): {cache['bytes_per_token']:,.0f} bytes per token at "
        f"{window} tokens against {cache['plain_bytes_per_token']:,.0f} plain (x{ratio:.2f} "
        f"smaller), {size(cache['bytes'])} in all; {cache['bits_per_number']:.2f} bits per number "
        "in the long run"
    )
    out.text(
        f"agreement with the full cache {cache['agreement']:.2%}, KL {cache['kl_to_full']:.4g} "
        f"nats per token, its perplexity {cache['full_perplexity']:.5g}"
    )


def _certainty(c: dict[str, Any]) -> str:
    """How sure a comparison is, or that its windows are too few to say."""
    from ..report.text import counted

    over = f"paired bootstrap over {counted(c['windows'], 'window')}"
    if c["p"] is None:
        return f"{over}: too few to rank by, give at least {c['windows_needed']}"
    return f"95 % {math.exp(c['low']):.4f}..{math.exp(c['high']):.4f}, {over}, p {c['p']:.2g}"


def _tell(result: dict[str, Any], out: Out) -> None:
    from ..report.text import Table, number, size

    base = result.get("baseline")
    table = Table("", ("", result["source"], *([base["source"]] if base else [])))
    sides = [result, *([base] if base else [])]

    def row(name: str, cells: list[str]) -> None:
        table.rows.append((name, *cells))

    row("perplexity", [number(s["quality"]["perplexity"], 5) for s in sides])
    row("weights", [size(s["size"]["total"]) for s in sides])
    row("bits per linear weight", [number(s["size"]["bits_per_linear_weight"]) for s in sides])
    row("resident", [size(s["size"]["resident_bytes"]) for s in sides])
    if all(s.get("speed") for s in sides):
        for key, name in (("prefill", "prefill tokens/s"), ("decode", "decode tokens/s")):
            row(name, [number(s["speed"][f"{key}_tokens_per_second"], 4) for s in sides])
    out.table(table)
    q = result["quality"]
    out.text(
        f"{q['windows']} windows of {q['window']} tokens ({q['tokens']:,}) of {q['data']} "
        f"({q['sha256'][:12]}), no overlap, tail dropped; target {result['target']}, "
        f"{result['dtype']}"
    )
    if base:
        c = base["comparison"]
        out.text(
            f"perplexity x{c['perplexity_ratio']:.4f} of the baseline ({_certainty(c)}); "
            f"recovery {base['recovery']:.4f}"
        )
        out.text(
            f"KL to the baseline {q['kl_to_baseline']:.4g} nats per token, "
            f"top-1 agreement {q['top1_agreement']:.2%}"
        )
    if "exits" in result:
        _tell_exits(result["exits"], result.get("speed"), out)
    if "cache" in result:
        _tell_cache(result["cache"], q["window"], out)
    grown = result["size"]["resident_above_stored"]
    if grown:
        more = sum(g["resident"] - g["stored"] for g in grown)
        hint = "" if out.verbose else "; -v lists them"
        out.text(f"{len(grown)} tensors take {size(more)} more in memory than stored{hint}")
    if out.verbose:
        held = Table("In memory above 1.1 x stored", ("tensor", "stored", "resident", "names"),
                     right=("stored", "resident"))  # fmt: skip
        held.rows = [
            (g["tensor"], size(g["stored"]), size(g["resident"]), " ".join(g["names"]))
            for g in grown
        ]
        out.table(held)
    out.text(f"peak memory {size(result['peak_rss_bytes'])}")
