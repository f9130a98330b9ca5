"""``llmc export``: a result in somebody else's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..runtime.exporting import FORMATS
from .output import Out, examples, output_options
from .progress import waiting

_WIDTH = max(map(len, FORMATS))
# Two spaces and the mark that keeps click from filling the lines up.
_LIST = "\b\nFormats:\n" + "\n".join(f"  {f.name:{_WIDTH}}  {f.help}" for f in FORMATS.values())


@click.command(epilog=examples(
    "llmc export out --format hf -o checkpoint",
    "llmc export out --format compressed-tensors -o for-vllm",
    "llmc export out --format gptq -o gptq --dtype f16 --force",
    "llmc export out --format awq -o awq --json",
))  # fmt: skip
@click.argument("source", metavar="ARTEFACT_OR_MODEL")
@click.option("--format", "form", required=True, metavar="NAME",
              help=f"One of {', '.join(FORMATS)}.")  # fmt: skip
@click.option("-o", "--out", "folder", required=True, type=click.Path(path_type=Path),
              help="The folder to write.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["f32", "bf16", "f16"]), default=None,
              help="Of dense weights.  [default: as stored most; gptq, awq: not f32]")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@click.option("--drop-exits", is_flag=True,
              help="Write the full model of a result with early exits.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True,
              help="Run modelling code that lies in the model's folder.")  # fmt: skip
@output_options
def export_command(
    source: str, form: str, folder: Path, dtype: str | None, force: bool, drop_exits: bool,
    trust_remote_code: bool, out: Out,
) -> None:  # fmt: skip
    from ..runtime.export import check_format, check_target

    check_format(form)
    check_target(folder.expanduser(), force)
    from .. import api
    from ..ir.types import DTYPES

    with waiting(f"loading {source}", out):
        model = api.open_any(source, trust_remote_code=trust_remote_code)

    def tell(text: str) -> None:
        if out.verbose or not text.startswith("capturing"):
            out.note(f"{text} ...")

    made = model.export(
        folder, format=form, dtype=DTYPES[dtype] if dtype else None, force=force,
        drop_exits=drop_exits, progress=tell,
    )  # fmt: skip
    _say(made, folder, out)
    out.data("export", {"source": source, "out": str(folder), **made})


export_command.help = f"""Write ARTEFACT_OR_MODEL in another format.

{_LIST}

The config under which the model's own class computes the same is searched for and proved, graph
against graph. hf writes all weights dense, zeros kept; the others write codes as they are, and what
was never quantised dense. What was written is read back before it appears: codes must be equal, and
logits on random tokens too (exit 4 where they differ). What a format has no place for is refused:
the layer and the field, size, bias or op are named.
"""


def _say(made: dict[str, Any], folder: Path, out: Out) -> None:
    for change in made.get("changes", ()):
        out.text(f"config: {change}")
    if "schemes" in made:
        out.text(", ".join(f"{n} linears {text}" for text, n in made["schemes"].items())
                 + f"; {len(made['dense'])} dense")  # fmt: skip
    apart = made["difference"]
    checked = (
        "no loader is installed to compare its logits"
        if apart is None
        else (
            f"loaded again, its logits differ by {apart:.2g} of the largest "
            f"(at most {made['tolerance']:g})"
        )
    )
    told = f"{made['architecture']}, {made['dtype']}, {made['bytes']} bytes of weights"
    out.text(f"{told}; {checked}")
    if made["rounding"] > made["tolerance"]:
        out.text(f"weights in {made['dtype']} move a logit by up to {made['rounding']:.2g}; "
                 "--dtype f32 keeps them exact")  # fmt: skip
    if made["left_out"]:
        out.text(f"left out, as the model has no place for them: {len(made['left_out'])} tensors, "
                 f"first {made['left_out'][0]}")  # fmt: skip
    for note in made.get("notes", ()):
        out.text(f"note: {note}")
    out.text(f"wrote {folder}")
