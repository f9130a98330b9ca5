"""What commands print: data on stdout, messages on stderr, one JSON object with --json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

FORMAT_VERSION = 1
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Out:
    """How much is said, and in which form.

    Attributes:
        as_json: one JSON object on stdout instead of tables.
        quiet: no messages; errors and data stay.
        verbose: one line per site while solving, full tables.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def human(self) -> bool:
        """Whether tables for people go to stdout."""
        return not self.as_json

    def note(self, text: str) -> None:
        """A message for people, on stderr."""
        if not self.quiet:
            click.echo(text, err=True)

    def text(self, text: str, *, newline: bool = True) -> None:
        """Data for people, on stdout; nothing with --json."""
        if self.human:
            click.echo(text, nl=newline)

    def table(self, table: Any, *, err: bool = False) -> None:
        """A :class:`~llmc.compiler.report.text.Table`, on stdout or as a message."""
        if (self.quiet if err else self.as_json) or not table.rows:
            return
        from ..report.text import show

        show(table, sys.stderr if err else sys.stdout)

    def data(self, command: str, value: dict[str, Any]) -> None:
        """The one JSON object of a command; nothing without --json."""
        if self.as_json:
            click.echo(json.dumps(
                {"format_version": FORMAT_VERSION, "command": command, **_finite(value)},
                ensure_ascii=False, allow_nan=False,
            ))  # fmt: skip


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def output_options(command: F) -> F:
    """Add --json, --quiet and --verbose; the command receives one :class:`Out` as ``out``."""

    def gather(*args: Any, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        return command(*args, out=Out(as_json, quiet, verbose), **kwargs)

    gather.__doc__, gather.__name__ = command.__doc__, command.__name__
    gather.__dict__.update(command.__dict__)
    options = [
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No messages on stderr but errors."),
        click.option("-v", "--verbose", is_flag=True, help="More detail."),
    ]
    made: Any = gather
    for option in reversed(options):
        made = option(made)
    return made


def examples(*lines: str) -> str:
    """An epilog of examples, shown as typed."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


_UNITS = {"": 1, "B": 1, "K": 1 << 10, "KB": 10**3, "KIB": 1 << 10, "M": 1 << 20, "MB": 10**6,
          "MIB": 1 << 20, "G": 1 << 30, "GB": 10**9, "GIB": 1 << 30}  # fmt: skip


def size(value: str) -> int:
    """Bytes, with an optional suffix: 4GB, 512MiB. Click calls it to convert an option."""
    text = str(value).strip()
    digits = text.rstrip("BbKkMmGgIi ")
    unit = text[len(digits) :].strip().upper()
    try:
        found = int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise click.BadParameter(f"expected bytes such as 4GB or 512MiB, found {value!r}") from None
    if found < 1:
        raise click.BadParameter(f"expected at least 1 byte, found {value!r}")
    return found
