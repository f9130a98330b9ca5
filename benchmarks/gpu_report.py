"""What a run of the GPU suite found: as pages of tables, and in as few words as a reply holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

MOST = 40  # names of what was left out; the JSON has all
REPLY = 11_000  # characters of a run's output that its machine sends back, or a little less
FEW = 20  # of what is wrong, on a screen
OFF = 0.03  # relative distance of logits beyond which they are wrong; not a number is beyond
BRIEF = ((1, 16), (256, 2048))  # numbers of tokens beside each other


def markdown(data: dict[str, Any]) -> str:
    """The pages as tables: kernels and peers by shape, then decode."""
    out = [f"# {data['device']}\n\n`{data['command']}`\n"]
    both = (*data["kernels"], *data["peers"])
    timed = [r for r in both if r.get("us") is not None]
    for N, K in dict.fromkeys((r["N"], r["K"]) for r in timed if "N" in r):
        here = [r for r in timed if (r.get("N"), r.get("K")) == (N, K)]
        tokens = sorted({r["tokens"] for r in here})
        rows = []
        for name in dict.fromkeys(_name(r) for r in here):
            own = {r["tokens"]: r for r in here if _name(r) == name}
            rows.append((name, *(_cell(own.get(m)) for m in tokens)))
        head = ("µs (share of copy, of floor)", *(f"M = {m}" for m in tokens))
        out.append(f"\n## {N} x {K}\n\n{_table(head, rows)}")
    steps = [
        (
            r["what"],
            f"{r['tokens_per_s']:.0f}",
            f"{r['us']:.0f}",
            f"{r.get('share_of_copy', 0):.2f}",
        )
        for r in data["decode"]
        if "us" in r
    ]
    if steps:
        head = ("decode, batch 1", "tokens/s", "µs", "share of copy")
        out.append(f"\n## Llama-3.1-8B shapes\n\n{_table(head, steps)}")
    told = data["numerics"]
    if told:
        out.append(f"\n## Numerics\n\n{told['cases']} cases of {len(told['rows'])} kernels, "
                   f"worst {told['worst_over_bound']:.2f} of its bound.\n")  # fmt: skip
    steps = [r for r in data["decode"] if "relative_error" in r]
    out += [f"\nLogits {r['what']}: off by {r['relative_error']:.1e}"
            f"{'' if r.get('replayed_alike', True) else ', and a recorded step differs'}.\n"
            for r in steps]  # fmt: skip
    out += [f"- {line}\n" for line in problems(data)]
    if data["skipped"]:
        more = len(data["skipped"]) - MOST
        named = [*data["skipped"][:MOST], *([f"{more} more"] * (more > 0))]
        out.append(f"\nLeft out for time: {', '.join(named)}.\n")
    return "".join(out)


def brief(data: dict[str, Any]) -> str:
    """The same for a screen that keeps the last 12,000 characters: what is wrong comes last."""
    both = [*data["kernels"], *data["peers"]]
    timed = {(_name(r), r["N"], r["K"], r["tokens"]): r for r in both if r.get("us") and "N" in r}
    shapes = list(dict.fromkeys(key[1:3] for key in timed))
    out = [f"{data['device']}, torch {data['torch']}, limits {data['limits']}\n"]
    for tokens in [pair for pair in BRIEF if any(key[3] in pair for key in timed)]:
        head = "".join(f"{f'{n >> 10}kx{k >> 10}k {m}':>12}" for n, k in shapes for m in tokens)
        out.append(f"\nus/share of floor {head}\n")
        for name in dict.fromkeys(key[0] for key in timed):
            cells = [_short(timed.get((name, *shape, m))) for shape in shapes for m in tokens]
            if any(cells):
                out.append(f"{name[:18]:18}" + "".join(f"{c:>12}" for c in cells) + "\n")
    for r in data["decode"]:
        if "us" in r:
            share = r.get("share_of_copy", 0.0)
            out.append(f"decode {r['what']}: {r['tokens_per_s']:.0f} tokens/s, {r['us']:.0f} us, "
                       f"{share:.2f} of copy\n")  # fmt: skip
    told, wrong = data["numerics"], problems(data)
    if told:
        out.append(f"numerics: {told['cases']} cases, worst {told['worst_over_bound']:.2f}, "
                   f"{len(told['wrong'])} wrong\n")  # fmt: skip
    out.append(f"seconds {data['seconds']}, {len(data['skipped'])} left out\n")
    out += [f"- {line[:120]}\n" for line in wrong[:FEW]]
    out += [f"- and {len(wrong) - FEW} more\n"] * (len(wrong) > FEW)
    return "".join(out)[-REPLY:]


def problems(data: dict[str, Any]) -> list[str]:
    """All that is wrong or failed, peers last."""
    steps = [f"logits {r['what']} are off by {r['relative_error']:.1e}"
             for r in data["decode"] if not r.get("relative_error", 0.0) <= OFF]  # fmt: skip
    steps += [f"a recorded step of {r['what']} differs from its launches"
              for r in data["decode"] if not r.get("replayed_alike", True)]  # fmt: skip
    rows = (*data["decode"], *data["kernels"], *data["peers"])
    failed = [f"{_name(r)} {r.get('N', '')} M={r.get('tokens', '')}: {r['error']}"
              for r in rows if "error" in r]  # fmt: skip
    return [*steps, *data["numerics"].get("wrong", ()), *failed]


def _name(r: dict[str, Any]) -> str:
    return str(r.get("kernel") or r.get("peer") or r.get("what"))


def _short(r: dict[str, Any] | None) -> str:
    if r is None:
        return ""
    share = f"/{r['share_of_floor']:.2f}" if "share_of_floor" in r else ""
    return f"{r['us']:.1f}{share.replace('/0.', '/.')}"


def _cell(r: dict[str, Any] | None) -> str:
    if r is None:
        return ""
    if "share_of_copy" not in r:
        return f"{r['us']:.1f}"
    return f"{r['us']:.1f} ({r['share_of_copy']:.2f}, {r['share_of_floor']:.2f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
