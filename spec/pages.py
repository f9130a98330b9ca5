"""The pages that are made from the code: ops, passes and kernels, each as Markdown.

``make golden`` writes them; a test fails when one is stale.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..codegen.listing import all_rows, described
from ..compiler.ir.ops import ROWS as OPS
from ..compiler.ir.ops import OpRow
from ..compiler.pipeline.base import Knob, Pass
from ..compiler.pipeline.order import JOINT, STAGES
from ..compiler.pipeline.registry import all_passes
from ..compiler.runtime import artefact, manifest, verify
from ..compiler.solvers import PAIRS

MADE = "<!-- Made from the code by `make golden`; edits here are lost. -->\n\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are put on one line and their bars escaped."""
    lines = [_line(head), "|" + "---|" * len(head)]
    return "\n".join([*lines, *(_line(row) for row in rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"


def _summary(thing: Any) -> str:
    """First paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def pass_classes() -> list[type[Pass]]:
    """Every pass once, in the order of its first name."""
    return list(dict.fromkeys(made for _, made in sorted(all_passes().items())))


def passes_table() -> str:
    """The README's table: what is decided, in applied order, and the passes that decide it."""
    by: dict[str, list[str]] = {stage: [] for stage, _, _ in STAGES}
    for made in pass_classes():
        by[made.stage] += made.variants
    rows = [
        (writes, " ".join(f"`{name}`" for name in sorted(by[stage])))
        for stage, writes, _ in STAGES
        if by[stage]
    ]
    return table(("what is decided, in this order", "passes"), rows)


def passes_page() -> str:
    """``spec/passes.md``: each pass with its knobs, preconditions and statistics."""
    parts = ["# Passes\n\n", MADE]
    for made in pass_classes():
        parts.append(f"## {', '.join(made.variants)}\n\n{made.law()}\n\n")
        facts = [
            ("effect", str(made.effect)),
            ("stage", made.stage),
            ("statistics", ", ".join(made.needs) or "none"),
            ("applies where", "; ".join(p.name for p in made.preconditions) or "the pattern holds"),
            ("source", made.source),
        ]
        for name, preset in made.variants.items():
            if preset:
                facts.append((f"`{name}`", ", ".join(f"{k}={v}" for k, v in preset.items())))
        parts.append(table(("", ""), facts) + "\n")
        knobs = made.knobs().values()
        if knobs:
            parts.append(table(("knob", "value", "default", "meaning"), map(_knob, knobs)) + "\n")
    parts.append(_order())
    return "".join(parts).rstrip() + "\n"


def _order() -> str:
    """How passes are ordered and what each pair of solvers means together."""
    stages = [(stage, writes, why) for stage, writes, why in STAGES]
    pairs = [(grid or "no grid", mask or "no mask", what) for (grid, mask), what in PAIRS.items()]
    return (
        "## Order\n\nInside one list passes are applied in this order, whatever was typed; the "
        "stages "
        + " and ".join(JOINT)
        + " are one joint solve. Between lists (barriers) the typed "
        "order is kept, and refused where it runs against this one.\n\n"
        + table(("stage", "writes", "why it stands here"), stages)
        + "\n## Solver pairs\n\n"
        + table(("codes by", "zeros by", "meaning"), pairs)
        + "\nA mask that an earlier list chose is frozen: codes are then solved around it.\n"
    )


def _knob(knob: Knob) -> tuple[str, str, str, str]:
    value = knob.range_text() + (" or none" if knob.optional else "")
    return (f"`{knob.name}`", value, str(knob.default).lower(), knob.help)


def ir_page() -> str:
    """``spec/ir.md``: each op row with its signature and what is known about it."""
    ours = [row for name, row in sorted(OPS.items()) if name.startswith("llmc.")]
    others = [row for name, row in sorted(OPS.items()) if not name.startswith("llmc.")]
    parts = [
        "# Ops\n\n",
        MADE,
        "An op whose dims are not tied blocks them: passes that cut, scale or permute are refused "
        "there. A graph that holds an op of neither table is refused at capture.\n\n",
        "## Ops of llmc\n\n",
    ]
    for row in ours:
        parts.append(f"### {row.name}\n\n`{_signature(row)}`\n\n")
        about = [_summary(row.reference), _known(row)]
        parts.append("\n\n".join(filter(None, about)) + "\n\n")
    parts.append("## Ops of torch\n\n")
    # Signatures are torch's own and differ between its releases: they stay out of a checked page.
    body = [(f"`{row.name}`", _known(row)) for row in others]
    parts.append(table(("op", "known"), body))
    return "".join(parts)


def _signature(row: OpRow) -> str:
    target: Any = row.target
    return "(" + str(target._schema).split("(", 1)[1]


def _known(row: OpRow) -> str:
    known = ["dims tied" if row.ties else "dims blocked"]
    if row.flops:
        known.append("flops counted")
    if row.stateful:
        known.append("reads and writes state")
    return ", ".join(known)


def kernels_page() -> str:
    """``spec/kernels.md``: each kernel row with its requirements, arguments and bytes."""
    parts = ["# Kernels\n\n", MADE]
    for row in map(described, all_rows()):
        parts.append(f"## {row['name']}\n\n{row['summary'][:1].upper()}{row['summary'][1:]}.\n\n")
        parts.append(table(("", ""), _kernel_facts(row)) + "\n")
        args = [
            (f"`{a['name']}`", a["shape"], ", ".join(a["dtypes"]),
             f"if {a['if']}" if a["if"] else "always")
            for a in row["arguments"]
        ]  # fmt: skip
        if args:
            parts.append(table(("argument", "shape", "dtypes", "present"), args) + "\n")
        parts.append(compiled_table(row["name"]))
    return "".join(parts).rstrip() + "\n"


def _kernel_facts(row: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("implements", f"`{row['op']}`"), ("template", f"`{row['template']}`")]
    facts += [(need["field"], need["expected"]) for need in row["requires"]]
    facts.append(("bytes moved", f"`{row['moves']}`"))
    if "tiles" in row:
        tiles = ", ".join(f"{tokens} x {features}" for tokens, features in row["tiles"])
        stages = ", ".join(map(str, row["stages"]))
        facts += [("tiles (tokens x features)", tiles), ("pipeline stages", stages)]
    return facts


FACTS = Path(__file__).with_name("kernels.json")
"""Facts of compiled kernels, written by `python -m llmc.codegen.facts spec/kernels.json`."""


def compiled_table(row: str) -> str:
    """What the machine code of a row's documented variants shows; empty where none was compiled."""
    if not FACTS.is_file():
        return ""
    told = json.loads(FACTS.read_text())
    rows = []
    for f in told["facts"]:
        if f["row"] != row:
            continue
        c = f["config"]
        tile = f"{c['BM']} x {c['BN']}" + (f" / {c['split']}" if c["split"] > 1 else "")
        if "unsupported" in f:
            rows.append((f["what"], f["target"], tile, f["unsupported"], *("",) * 6))
            continue
        numbers = ("registers", "stack", "shared", "local_memory", "loop_stores", "slots")
        rows.append((f["what"], f["target"], tile, " ".join(f["matrix"]) or "none",
                     *(str(f[n]) for n in numbers)))  # fmt: skip
    head = ("variant", "machine", "tile", "matrix instruction", "registers", "stack", "shared",
            "LDL and STL", "shared stores in the loop", "slots per weight")  # fmt: skip
    if not rows:
        return ""
    return f"Compiled without a GPU by Triton {told['triton']}.\n\n{table(head, rows)}\n"


def artefact_page() -> str:
    """``spec/artefact.md``: the folder, its manifest and what a reader checks."""
    parts = ["# Artefacts\n\n", MADE, f"{_summary(artefact)} {_summary(artefact.save)}\n\n"]
    parts.append("## Contents\n\n" + _attributes(artefact.Contents) + "\n")
    kept = ", ".join(f"`{n}`" for n in artefact.TOKENIZER_FILES)
    facts = ", ".join(f"`{n}`" for n in artefact.NEUTRAL_FACTS)
    parts.append(f"Files of the tokenizer: {kept}. Facts that a run needs: {facts}.\n\n")
    parts.append("## manifest.json\n\n")
    for model in (manifest.Manifest, manifest.File, manifest.Tensor):
        parts.append(f"### {model.__name__}\n\n{_summary(model)}\n\n")
        known = dict(_attribute_rows(model))
        rows = [
            (f"`{name}`", _type(f.annotation),
             known.get(name, ""))
            for name, f in model.model_fields.items()
        ]  # fmt: skip
        parts.append(table(("field", "type", "meaning"), rows) + "\n")
    parts.append(f"## Reading\n\n{_paragraph(artefact, 1)}\n\n")
    parts.append(f"{_summary(verify.verify)} {_paragraph(verify.verify, 1)}\n")
    return "".join(parts)


def _type(annotation: Any) -> str:
    """A field's type without module names."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace(f"{manifest.__name__}.", "").replace("typing.", "")


def _paragraph(thing: Any, index: int) -> str:
    """One paragraph of a docstring on one line; empty where there are fewer."""
    parts = (inspect.getdoc(thing) or "").split("\n\n")
    return " ".join(parts[index].split()) if index < len(parts) else ""


def _attribute_rows(thing: Any) -> list[tuple[str, str]]:
    """(names, meaning) from the ``Attributes:`` part of a docstring."""
    text = (inspect.getdoc(thing) or "").partition("Attributes:\n")[2]
    rows: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.startswith("    ") and not line.startswith("        ") and ": " in line:
            for one in line.strip().split("; "):
                name, colon, meaning = one.partition(": ")
                if colon and " " not in name.replace(", ", ""):
                    rows += [(n, meaning) for n in name.split(", ")]
                elif rows:
                    rows[-1] = (rows[-1][0], f"{rows[-1][1]}; {one}")
        elif rows and line.strip():
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
    return rows


def _attributes(thing: Any) -> str:
    return table(("part", "meaning"), [(f"`{n}`", m) for n, m in _attribute_rows(thing)])


PAGES: dict[str, Callable[[], str]] = {
    "spec/ir.md": ir_page,
    "spec/passes.md": passes_page,
    "spec/kernels.md": kernels_page,
    "spec/artefact.md": artefact_page,
}
