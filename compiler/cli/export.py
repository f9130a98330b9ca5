"""``llmc export``: a result in somebody else's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import Out, examples, output_options
from .progress import waiting


@click.command(epilog=examples(
    "llmc export out --format hf -o checkpoint",
    "llmc export out --format hf -o checkpoint --dtype bf16 --force",
    "llmc export out --format hf -o checkpoint --json",
))  # fmt: skip
@click.argument("source", metavar="ARTEFACT_OR_MODEL")
@click.option("--format", "form", required=True, metavar="NAME",
              help="hf: a Hugging Face checkpoint that plain from_pretrained loads.")  # fmt: skip
@click.option("-o", "--out", "folder", required=True, type=click.Path(path_type=Path),
              help="The folder to write.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["f32", "bf16", "f16"]), default=None,
              help="Of the weights.  [default: as most of them are stored]")  # fmt: skip
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
    """Write ARTEFACT_OR_MODEL in another format.

    hf: the config under which the model's own class computes the same is searched for and proved,
    graph against graph; packed weights are written dense, zeros kept. The folder is loaded with
    from_pretrained and its logits are compared before it appears (exit 4 where they differ). What
    does not fit is refused: the layer and the size, bias or op are named.
    """
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


def _say(made: dict[str, Any], folder: Path, out: Out) -> None:
    for change in made["changes"]:
        out.text(f"config: {change}")
    out.text(
        f"{made['architecture']}, {made['dtype']}, {made['bytes']} bytes of weights; loaded again, "
        f"its logits differ by {made['difference']:.2g} of the largest "
        f"(at most {made['tolerance']:g})"
    )
    if made["rounding"] > made["tolerance"]:
        out.text(f"weights in {made['dtype']} move a logit by up to {made['rounding']:.2g}; "
                 "--dtype f32 keeps them exact")  # fmt: skip
    if made["left_out"]:
        out.text(f"left out, as the model has no place for them: {len(made['left_out'])} tensors, "
                 f"first {made['left_out'][0]}")  # fmt: skip
    out.text(f"wrote {folder}")
