"""The `moellava` command. Each subcommand lives in its own module and is imported only when it is called."""

from __future__ import annotations

import importlib
import sys

from moellava.errors import UserError

COMMANDS = {
    "chat": ("moellava.commands.chat", "talk to a model about images"),
    "inspect": ("moellava.commands.inspect", "records as the model sees them: text, tokens, mask, counts"),
    "check-data": ("moellava.commands.check_data", "every record and file of a data set"),
    "verify": ("moellava.commands.verify", "recompute the golden.safetensors of a folder"),
    "upcycle": ("moellava.commands.upcycle", "dense folder -> MoE folder, with its certificate"),
    "export": ("moellava.commands.export", "write a model in the layout of LLaVA and MoE-LLaVA"),
    "merge-lora": ("moellava.commands.merge_lora", "base folder + adapter -> merged folder, logits compared"),
    "models": ("moellava.commands.models", "families and released models that are known"),
    "eval": ("moellava.commands.eval", "score a model on a benchmark"),
}
"""name -> (module with `main(argv: list[str]) -> int`, one-line help)."""


def usage() -> str:
    """The list of subcommands, one a line."""
    lines = [f"  {name:12} {help_line}" for name, (_, help_line) in COMMANDS.items()]
    return "usage: moellava COMMAND …\n\n" + "\n".join(lines) + "\n\n`moellava COMMAND --help` explains one."


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; a user's mistake is one message and exit status 2, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"moellava: unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
    except UserError as error:
        print(f"moellava {argv[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
