"""`python -m moellava.serve.cli`: the name that MoE-LLaVA knows `moellava chat` by."""

import sys

from moellava.commands.chat import main
from moellava.errors import UserError

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as mistake:
        sys.exit(f"moellava chat: {mistake}")
