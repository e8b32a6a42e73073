# SPDX-License-Identifier: Apache-2.0
"""`moellava serve`: a model behind OpenAI's API, and a page to talk to it."""

from __future__ import annotations

import argparse
import os
import socket
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moellava.commands.given import Idle, refuse_idle
from moellava.commands.values import CommandParser, amount, count
from moellava.data.images import Limits
from moellava.errors import UserError
from moellava.log import printable
from moellava.startup import importing

if TYPE_CHECKING:
    from moellava.serve.api.limits import ServerLimits
    from moellava.vlm import VLM

KEY_VARIABLE = "MOELLAVA_API_KEY"
"""Where the key may stand, for flags are seen by everyone on the machine."""

NEEDS = ("fastapi", "uvicorn", "httpx")

PAGE_NEEDS = ("gradio",)

MEBI = 2**20

CLOSING_SECONDS = 5
"""How long answers may go on once the server is told to end."""


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(prog="moellava serve", description="Serve a model: OpenAI's API, and a page.")
    parser.add_argument("--model-path", required=True, help="folder of a stage, or a published checkpoint")
    parser.add_argument("--model-base", help="the language model that a published projector or adapter belongs to")
    parser.add_argument("--version", help="conversation template, in place of the one that the folder names")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps … (the best there is)")
    parser.add_argument("--served-model-name", help="what clients call the model (the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (8000)")
    parser.add_argument("--api-key", help=f"what every request has to bring; better set {KEY_VARIABLE}")
    parser.add_argument("--api-only", action="store_true", help="no page")
    parser.add_argument("--batch-size", type=count, default=8, help="requests answered together (8)")
    parser.add_argument("--max-requests", type=count, default=64, help="requests at a time; more are refused (64)")
    parser.add_argument("--max-new-tokens", type=count, default=2048, help="longest answer, in tokens (2048)")
    parser.add_argument("--max-body-mb", type=amount, default=16.0, help="largest request in MiB (16)")
    parser.add_argument("--max-images", type=count, default=16, help="pictures of a request (16)")
    parser.add_argument(
        "--max-image-pixels", type=count, default=2**25, help=f"pixels of a request's pictures together ({2**25})"
    )
    parser.add_argument("--max-image-side", type=count, default=30_000, help="longest side of a picture (30000)")
    parser.add_argument("--max-aspect-ratio", type=amount, default=200.0, help="longer side by the shorter one (200)")
    parser.add_argument(
        "--allow-domain", nargs="+", default=[], metavar="HOST", help="hosts that pictures may be fetched from (none)"
    )
    return parser


def idle_flags(args: argparse.Namespace) -> list[Idle]:
    """Flags that others leave nothing to do."""
    few = f"no more than --max-requests {args.max_requests} are there to be answered together"
    return [
        Idle(["api_key"], KEY_VARIABLE in os.environ, f"{KEY_VARIABLE} is set, too: use one"),
        Idle(["batch_size"], args.batch_size > args.max_requests, few),
    ]


def main(argv: list[str]) -> int:
    """Entry point of the command."""
    parser = make_parser()
    args = parser.parse_args(argv)
    refuse_idle(parser, argv, idle_flags(args))
    require_packages(NEEDS if args.api_only else (*NEEDS, *PAGE_NEEDS))
    key, limits = key_of(args), limits_of(args)
    with importing():
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        from moellava.model.devices import device_named
        from moellava.vlm import open_vlm
    device = device_named(args.device) if args.device is not None else None
    with listening(args.host, args.port) as listener:
        disable_progress_bar()
        set_verbosity_error()
        vlm = open_vlm(args.model_path, base=args.model_base, device=device, version=args.version)
        serve(vlm, args, key, limits, listener)
    return 0


def require_packages(names: tuple[str, ...]) -> None:
    """Raises UserError for what is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"This needs {', '.join(missing)}: pip install 'moellava[serve]'")


def key_of(args: argparse.Namespace) -> str | None:
    """What requests have to bring. Raises UserError for none where others reach the server, or an empty one."""
    from moellava.serve.api.guard import is_loopback  # of an extra that other commands do without

    key = os.environ.get(KEY_VARIABLE, args.api_key)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UserError("The API key is empty, or has letters that no header carries: use ASCII without spaces around.")
    if key is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: whoever reaches this machine could ask. Set a key, in {KEY_VARIABLE} or by --api-key."
        )
    return key


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where the address cannot be had."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: ports go from 0, which takes a free one, to {2**16 - 1}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: {error}. Give another one, or --port 0 for any.") from error


def limits_of(args: argparse.Namespace) -> ServerLimits:
    """What the server takes on."""
    from moellava.serve.api.limits import ServerLimits

    return ServerLimits(
        requests=args.max_requests,
        batch_size=args.batch_size,
        body_bytes=int(args.max_body_mb * MEBI),
        images=args.max_images,
        image=Limits(args.max_image_pixels, args.max_image_side, args.max_aspect_ratio),
        new_tokens=args.max_new_tokens,
        domains=frozenset(map(host_of, args.allow_domain)),
    )


def host_of(text: str) -> str:
    """A host as URLs name it. Raises UserError for a whole URL, which no host would equal."""
    if not text or set("/@?# ") & set(text):
        raise UserError(f"--allow-domain {text}: give hosts alone, as example.com or localhost:8080.")
    return text.lower()


def serve(vlm: VLM, args: argparse.Namespace, key: str | None, limits: ServerLimits, listener: socket.socket) -> None:
    """Answers until it is told to end (Ctrl-C)."""
    import uvicorn

    from moellava.serve.api.app import Service, Settings, create_app
    from moellava.serve.api.guard import is_loopback
    from moellava.serve.api.scheduler import Scheduler

    name = args.served_model_name or Path(args.model_path).resolve().name
    service = Service(Scheduler(vlm, limits), Settings(name, key, is_loopback(args.host)))
    app = create_app(service)
    if not args.api_only:
        from moellava.serve.api.page import with_page

        app = with_page(app, service)
    shown = f"[{args.host}]" if ":" in args.host else args.host
    where = f"http://{shown}:{listener.getsockname()[1]}"
    print(printable(f"{name}: {where}/v1" + ("" if args.api_only else f", and a page at {where}/")), flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=CLOSING_SECONDS)
    with suppress(KeyboardInterrupt):  # of Ctrl-C, which uvicorn hands on once its answers have ended
        uvicorn.Server(config).run(sockets=[listener])
