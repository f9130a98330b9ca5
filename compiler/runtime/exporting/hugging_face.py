"""``hf``: a checkpoint with dense weights that the model's own class loads."""

from __future__ import annotations

from typing import Any

from ...ir.types import short
from ..artefact import versions
from ..files import canonical_json, new_folder
from .job import OVERHEAD, RECORD, Job


def write(job: Job) -> dict[str, Any]:
    """Write the config under which the model's class computes the same, and dense weights.

    Raises:
        UsageError: the class has no place for what the program does. GateError: other logits.
    """
    from ...capture import write_back
    from ...capture.configs import say
    from ...capture.fit import fit

    program, folder = job.program, job.folder
    job.tell("looking for the config")
    fitted = fit(program, job.tell)
    kind = job.dtype or write_back.stored_dtype(program)
    size = write_back.bytes_of(fitted, kind)
    with new_folder(folder, needed=size + OVERHEAD, force=job.force) as out:
        job.tell(f"writing {folder}")
        write_back.write(fitted, out.path, kind, job.side)
        job.tell("loading it and comparing logits")
        apart, rounded = write_back.check(fitted, out.path)
        record = {
            "format": "hf", "architecture": fitted.family.model.__name__,
            "changes": [*fitted.family.written, *say(fitted.changes)], "dtype": short(kind),
            "bytes": size, "left_out": list(program.facts.get("unread") or ()),
            "difference": apart, "rounding": rounded, "tolerance": write_back.TOLERANCE,
            "versions": versions(),
        }  # fmt: skip
        out.write(RECORD, canonical_json(record))
        out.adopt()
    return record
