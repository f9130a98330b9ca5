"""Options of mixed precision, shared by ``llmc compile`` and ``llmc plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..ir.errors import UsageError
from .output import Out
from .progress import Solving

if TYPE_CHECKING:
    from ..api import Settings
    from ..ir.graph import Program
    from ..pipeline.mixing import Mixture
    from ..pipeline.recipe import Recipe
    from ..pipeline.target import Target

F = TypeVar("F")

_OPTIONS = [
    click.option("--bits", type=float, metavar="N",
                 help="Mixed precision: choose a width for each group of weights so that the grid "
                 "pass stores N bits per weight, scales and all, e.g. 4.25."),
    click.option("--size", metavar="SHARE",
                 help="The same for a share of the whole model's bytes, e.g. 60%."),
    click.option("--budget", metavar="PPL",
                 help="The same for the fewest bytes whose perplexity on a held-out slice of the "
                 "calibration text rises by no more, e.g. ppl+2% or ppl+0.3."),
    click.option("--candidates", metavar="LIST",
                 help="Grids to choose from, e.g. w3,w4:group=32,nf4,dense.  "
                 "[default: every width of the recipe's grid pass, and dense]"),
    click.option("--sensitivity", metavar="WHAT", default=None,
                 help="What predicts the rise of the loss: proxy (error of the layer's output), "
                 "fisher, loss (the model with one group changed; slow), or auto, which tries "
                 "fisher and proxy.  [default: auto]"),
    click.option("--write-recipe", type=click.Path(path_type=Path), metavar="FILE",
                 help="Write the recipe that was chosen as YAML, for --recipe."),
]  # fmt: skip


def mixing_options(command: F) -> F:
    """Add the options of mixed precision."""
    made: Any = command
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


def target_of(given: dict[str, Any]) -> Target | None:
    """What the options aim at, None where they do not.

    Raises:
        UsageError: two aims, one that cannot be read, or an option that says nothing without one.
    """
    from ..pipeline.mixing import check_sensitivity
    from ..pipeline.target import read_target

    target = read_target(given["bits"], given["size"], given["budget"])
    for name in ("candidates", "sensitivity", "write_recipe"):
        if given[name] is not None and target is None:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag}: expected --bits, --size or --budget beside it, found none")
    check_sensitivity(given["sensitivity"] or "auto")
    path = given["write_recipe"]
    if path is not None and (path.exists() or not path.absolute().parent.is_dir()):
        found = "a file there" if path.exists() else "no folder to write into"
        raise UsageError(f"--write-recipe: expected a new file, found {found}: {path}")
    return target


def choose(
    program: Program, recipe: Recipe, target: Target, model: str, calibration: str | None,
    settings: Settings, given: dict[str, Any], out: Out,
) -> Mixture:  # fmt: skip
    """Run the choice with a progress bar; write the recipe where that was asked for."""
    from .. import api

    tokenizer = api.find_tokenizer(model, program)
    with Solving("mixing", out) as progress:
        mixture = api.mix(
            program, recipe, target, calibration, tokenizer, settings,
            candidates=given["candidates"], sensitivity=given["sensitivity"] or "auto",
            listener=progress,
        )  # fmt: skip
    if given["write_recipe"] is not None:
        import yaml

        text = yaml.safe_dump(mixture.record["recipe"], sort_keys=False, width=100)
        given["write_recipe"].write_text(text, encoding="utf-8")
        out.note(f"wrote {given['write_recipe']}")
    return mixture
