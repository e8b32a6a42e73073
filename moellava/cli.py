# SPDX-License-Identifier: Apache-2.0
"""The `moellava` command. Each subcommand lives in its own module and is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from contextlib import suppress

from moellava import __version__
from moellava.errors import UserError, did_you_mean
from moellava.log import printable
from moellava.plugins import FLAG, load_plugins

COMMANDS = {
    "train": ("moellava.commands.train", "one stage: from flags or a run file to a folder"),
    "recipe": ("moellava.commands.recipe", "hyper-parameters of LLaVA-1.5 and MoE-LLaVA, as a run file"),
    "demo": ("moellava.commands.demo", "the three stages on a small benchmark, with a table of scores"),
    "env": ("moellava.commands.env", "versions, devices, engines, and what is missing for what"),
    "chat": ("moellava.commands.chat", "talk to a model about images"),
    "serve": ("moellava.commands.serve", "OpenAI's API and a page for a model"),
    "inspect": ("moellava.commands.inspect", "what can be done with a model; records as it sees them"),
    "check-data": ("moellava.commands.check_data", "every record and file of a data set"),
    "convert-data": ("moellava.commands.convert_data", "data files of any format -> LLaVA JSON Lines"),
    "verify": ("moellava.commands.verify", "recompute the golden.safetensors of a folder"),
    "plan": ("moellava.commands.plan", "memory and speed of a run on so many devices, before it starts"),
    "upcycle": ("moellava.commands.upcycle", "dense folder -> MoE folder, with its certificate"),
    "prune": ("moellava.commands.prune", "sparse folder -> a smaller one, without experts that carry little"),
    "export": ("moellava.commands.export", "a folder that opens without moellava, with its proof"),
    "merge-lora": ("moellava.commands.merge_lora", "base folder + adapter -> merged folder, logits compared"),
    "models": ("moellava.commands.models", "families and released models that are known"),
    "compare": ("moellava.commands.compare", "was the MoE worth it? stage 3 and dense controls, scored alike"),
    "eval": ("moellava.commands.eval", "score a model on benchmarks"),
    "routing": ("moellava.commands.routing", "which expert each token goes to: numbers, pictures, a page"),
    "report": ("moellava.commands.report", "a run of train.py as one page and a few pictures"),
}
"""name -> (module with `main(argv: list[str]) -> int`, one-line help)."""


CLOSED_PIPE = 141
"""Exit status when whoever reads the output has gone: 128 + SIGPIPE, as shells report it."""


INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT."""


def usage() -> str:
    """The list of subcommands, one a line."""
    lines = [f"  {name:12} {help_line}" for name, (_, help_line) in COMMANDS.items()]
    plugins = "Each takes --plugin FILE.py: code that registers templates, projectors … (docs/PLUGINS.md)."
    return "\n".join(["usage: moellava COMMAND …", "", *lines, "", "`moellava COMMAND --help` explains one.", plugins])


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. A user's mistake, or a file or disk that fails, is one message and exit status 2, without a
    traceback; Ctrl-C ends it with one line, and a pipe that closes quietly."""
    argv = sys.argv[1:] if argv is None else argv
    _print_anything()
    try:
        status = _run(argv)
    except SystemExit as leaving:  # of argparse, which has printed a help
        lost = _flushed(argv)
        if lost is None:
            raise
        raise SystemExit(lost) from leaving
    except UserError as error:
        status = _refused(argv, error)
    except BrokenPipeError:
        status = CLOSED_PIPE
    except KeyboardInterrupt:
        with suppress(OSError):
            print(printable(f"\nmoellava {' '.join(argv[:1])}: interrupted"), file=sys.stderr)
        status = INTERRUPTED
    except OSError as error:
        status = _refused(argv, error)
    return _flushed(argv) or status


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(printable(f"moellava {__version__}"))
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS, repr)
        print(printable(f"moellava: unknown command {argv[0]!r}.{hint}\n\n{usage()}"), file=sys.stderr)
        return 2
    command = importlib.import_module(COMMANDS[argv[0]][0])
    # Training notes its plug-ins with its other flags.
    return command.main(argv[1:] if argv[0] == "train" else with_plugins(argv[1:]))


def with_plugins(argv: list[str]) -> list[str]:
    """Runs the files of `--plugin FILE`, which every subcommand takes; returns the other words. Raises UserError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="moellava")
    parser.add_argument(FLAG, action="append", default=[])
    known, rest = parser.parse_known_args(argv)
    load_plugins(known.plugin)
    return rest


def _refused(argv: list[str], error: Exception) -> int:
    with suppress(OSError):  # nobody may be there to read it
        print(printable(f"moellava {' '.join(argv[:1])}: {error}"), file=sys.stderr)
    return 2


def _flushed(argv: list[str]) -> int | None:
    """Writes what is left of the output, here and not at the interpreter's end, where nobody could catch what goes
    wrong. Returns the exit status if it cannot be written: what is left is dropped then."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE if isinstance(error, BrokenPipeError) else _refused(argv, error)
    return None


def _print_anything() -> None:
    """What a terminal cannot show (ASCII alone, or half of a surrogate pair) is printed as an escape, like \\u2026."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is no UTF-8 is half a character, which a question names
        sys.stdin.reconfigure(errors="surrogateescape")


if __name__ == "__main__":
    sys.exit(main())
