"""`main`: finds the subcommand, parses its arguments, and turns errors into one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from jaxheads.cli.terminal import fail, stdout
from jaxheads.names import unknown

COMMANDS: Mapping[str, str] = {
    "load": "Load a model, say what it is, and check it on a known text.",
    "heads": "Score every head: retrieval, induction, previous token, duplicate token.",
    "sweep": "Change every head, one at a time, and measure what that does.",
    "circuit": "Find the edges between heads that carry a behaviour.",
    "routes": "Show which heads a router chooses, and at which tokens.",
    "cache": "Compare key/value caches that keep less of the context.",
    "eval": "Measure a model on a task, with and without edits.",
    "generate": "Continue a prompt, with or without edits.",
    "chat": "Talk with a model; switch edits on and off between turns.",
    "train": "Find the heads a task needs and train offsets for them (LoFiT).",
    "report": "Write the HTML page of a training run.",
    "export": "Fold edits into the weights and write a Hugging Face directory.",
    "demo": "Run the demonstration on a small pretrained model.",
}
"""Subcommands in the order of a first session; each has a module of its name beside this."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments; default those of the process.

    Returns:
      The exit code: 0 for success, 2 for a mistake of the user's or a file that cannot be
      read or written (told in one line), 130 for Ctrl-C. Anything else is a bug and
      raises.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        _print_help()
        return 0 if argv else 2
    if argv[0] == "--version":
        stdout().print(f"jaxheads {_version()}", highlight=False)
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        return fail(unknown("command", name, COMMANDS))
    return _guarded(importlib.import_module(f"jaxheads.cli.{name}").main, rest)


def _guarded(command: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        command(argv)
        sys.stdout.flush()
    except SystemExit as stop:  # The parser's: after --help, or after telling what is wrong.
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return fail("interrupted", code=130)
    except BrokenPipeError:
        # The reader of a pipe went away, as `head` does: nobody is left to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        return fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except ValueError as error:
        return fail(str(error) or type(error).__name__)
    return 0


def _print_help() -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, summary in COMMANDS.items():
        table.add_row(f"  [bold]{name}[/bold]", summary)
    out = stdout()
    out.print("usage: jaxheads COMMAND ...", highlight=False)
    out.print("\nAttention heads of pretrained transformers as plain values.\n", highlight=False)
    out.print(table)
    out.print(
        "\nA MODEL is a name (smollm2-135m-instruct), a Hugging Face directory, a .gguf file or"
        "\nwhat `jaxheads load --save` wrote. A head is written LAYER.HEAD, such as 18.6."
        "\n\n`jaxheads COMMAND --help` explains a command, with an example.",
        highlight=False,
    )


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("jaxheads")
