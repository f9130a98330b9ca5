"""The group of all commands: lazy loading, exit codes, one line per error.

Exit codes: 0 ok, 1 a bug of ours, 2 usage or recipe, 3 bad model or artefact, 4 a gate failed,
5 resources, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from ..ir.errors import LlmcError, nearest

# Command -> (module, one line for the list of commands).
COMMANDS: dict[str, tuple[str, str]] = {
    "compile": ("make", "compress a model into an artefact"),
    "plan": ("make", "say what compile would do; loads no weight"),
    "run": ("use", "generate text from an artefact or a model"),
    "eval": ("measure", "perplexity, divergence, size and speed"),
    "export": ("export", "write a result in another format"),
    "inspect": ("look", "program, sites, schemes and bytes, from headers alone"),
    "report": ("report", "all of a result as one HTML file"),
    "groups": ("groups", "what must be cut together, and what a unit costs"),
    "diff": ("look", "what one pass changed in the graph"),
    "passes": ("passes", "the passes with their knobs"),
    "explain": ("explain", "where a pass applies, where it nearly did, and why not"),
    "kernels": ("kernels", "fused ops, their kernels, and what is not fused"),
    "tune": ("tune", "measure which kernel is fastest on this machine"),
    "verify": ("use", "check an artefact"),
    "doctor": ("doctor", "what this machine can run, and why not"),
}
# Errors of the machine rather than of the input.
_RESOURCES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE,
              errno.EFBIG, errno.ENFILE}  # fmt: skip
_EXAMPLES = """
\b
Examples:
  llmc compile ./model --passes smooth,w4,prune24 -o out
  llmc run out --prompt "def main("
  llmc eval out --data text.txt --baseline ./model

Every command takes --json and --help.
"""


class App(click.Group):
    """The commands by name; a command's module is imported when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__package__}.{COMMANDS[cmd_name][0]}")
        found: click.Command = getattr(module, f"{cmd_name}_command")
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = nearest(args[0], COMMANDS) or "see: llmc --help"
            raise click.UsageError(f"expected a command, found {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run, and exit with the code that the outcome has."""
        if "_LLMC_COMPLETE" in os.environ:
            super().main(args, prog_name, complete_var, standalone_mode, **extra)
        given = list(sys.argv[1:] if args is None else args)
        sys.exit(_guarded(self, given, prog_name or "llmc", extra))


class Terminated(BaseException):
    """SIGTERM arrived: unwind, so that nothing half-written stays."""


def _on_term(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _guarded(group: App, args: list[str], name: str, extra: dict[str, Any]) -> int:
    """Run the command line; return the exit code, having said why on stderr."""
    if not args:
        click.echo(group.get_help(click.Context(group, info_name=name)), err=True)
        return 2
    try:
        before = signal.signal(signal.SIGTERM, _on_term)
    except ValueError:  # not the main thread: nothing to install, nothing to restore
        before = None
    try:
        with group.make_context(name, args, **extra) as ctx:
            group.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted; nothing was written", 130)
    except Terminated:
        return _say("terminated; nothing was written", 143)
    except click.UsageError as e:
        command = e.ctx.command_path if e.ctx is not None else name
        return _say(f"{e.format_message()} ({command} --help lists what there is)", 2)
    except click.ClickException as e:
        return _say(e.format_message(), e.exit_code)
    except Exception as e:
        return _failure(e)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _failure(e: Exception) -> int:
    """The exit code of an exception, its one line said."""
    if isinstance(e, BrokenPipeError):
        # The reader went away; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    if os.environ.get("LLMC_DEBUG") == "1":
        import traceback

        traceback.print_exception(e)
    if isinstance(e, LlmcError) and e.exit_code != 1:
        return _say(str(e), e.exit_code)
    if isinstance(e, OSError) and e.errno in _RESOURCES:
        where = f" at {e.filename}" if e.filename else ""
        return _say(f"expected room and a working disk, found: {e.strerror}{where}", 5)
    if isinstance(e, MemoryError) or _out_of_memory(e):
        return _say("expected enough memory, found none left; try a smaller --batch or --length", 5)
    return _say(f"a bug in llmc: {type(e).__name__}: {e} (LLMC_DEBUG=1 shows the traceback)", 1)


def _out_of_memory(e: Exception) -> bool:
    """torch reports memory that it cannot have as a RuntimeError."""
    text = str(e)
    known = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(e, RuntimeError) and any(k in text for k in known)


def _say(message: str, code: int) -> int:
    line = " ".join(str(message).split())
    click.echo(f"llmc: {line}", err=True)
    return code


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from ... import __version__

        click.echo(f"llmc {__version__}")
        ctx.exit()


@click.command(cls=App, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, callback=_version, expose_value=False, is_eager=True,
              help="Print the version.")  # fmt: skip
def app() -> None:
    """Compress language models: capture, plan, solve, lower.

    A model folder goes in, an artefact comes out; every step is a checked rewrite of a graph.
    """


def main() -> NoReturn:
    """The entry point ``llmc``."""
    app.main()
