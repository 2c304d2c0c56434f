"""The command `serve`: `unigen serve --port 8000`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from unigen.commands.arguments import (
    float_range,
    int_range,
    load_arguments,
    model_arguments,
)
from unigen.utils.argparser import non_empty
from unigen.utils.extras import require_extra

HELP = "serve text and pictures by the OpenAI API"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unigen serve`."""
    parser.add_argument(
        "--host",
        type=non_empty,
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 is all interfaces (default: %(default)s)",
    )
    parser.add_argument("--port", type=int_range(1, 65_535), default=8000, help="(default: %(default)s)")
    parser.add_argument("--name", type=non_empty, help="name of the model in requests (default: as --model)")
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--slots", type=int_range(1), default=32, help="sequences generated at a time (default: %(default)s)"
    )
    group.add_argument(
        "--queue", type=int_range(1), default=128, help="answers that run or wait, at most (default: %(default)s)"
    )
    group.add_argument(
        "--timeout",
        type=float_range(0, open_low=True),
        default=300.0,
        help="seconds an answer may take (default: %(default)g)",
    )
    group.add_argument(
        "--max-body",
        type=int_range(1),
        default=32,
        metavar="MB",
        help="size of a request, at most (default: %(default)s)",
    )
    group.add_argument("--rate", type=int_range(0), default=0, help="requests per minute and client; 0 is no limit")
    group = parser.add_argument_group("faults")
    group.add_argument(
        "--heartbeat-timeout",
        type=float_range(3),
        default=30.0,
        metavar="S",
        help="restart the model after so many seconds without a heartbeat (default: %(default)g)",
    )
    group.add_argument(
        "--restart-timeout",
        type=float_range(1),
        default=300.0,
        metavar="S",
        help="/health fails when the model has been away for so many seconds (default: %(default)g)",
    )
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        help="key that clients send; may be repeated; also from UNIGEN_API_KEY",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name of this server, checked where there is no key; may be repeated; * is any"
        " (default: localhost, --host, addresses)",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        help="origin of pages that may call the server (CORS); may be repeated",
    )
    group.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="proxy whose X-Forwarded-For is trusted, an address or a network; may be repeated (default: none)",
    )
    group.add_argument("--allow-fetch", action="store_true", help="read pictures from public http(s) addresses")
    group.add_argument(
        "--images-folder", type=non_empty, metavar="FOLDER", help="keep pictures that are requested by url"
    )
    group.add_argument("--log-prompts", action="store_true", help="write prompts to the log")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the model until the process is stopped. Returns the exit code."""
    require_extra("serve")
    from unigen.serving import app
    from unigen.serving.config import RequestLimits, ServerConfig

    load_options = load_arguments(args)
    keys = (*args.api_key, *(os.environ[name] for name in ["UNIGEN_API_KEY"] if name in os.environ))
    limits = RequestLimits(
        api_keys=keys,
        max_body_bytes=args.max_body << 20,
        requests_per_minute=args.rate,
        allowed_hosts=(*args.allow_host, args.host),
        allowed_origins=tuple(args.allow_origin),
    )
    config = ServerConfig(
        model_name=args.name or args.model,
        limits=limits,
        request_timeout=args.timeout,
        images_folder=Path(args.images_folder) if args.images_folder else None,
        allow_fetch=args.allow_fetch,
        log_prompts=args.log_prompts,
        allowed_origins=tuple(args.allow_origin),
        trusted_proxies=tuple(args.trusted_proxy),
        heartbeat_timeout=args.heartbeat_timeout,
        unavailable_timeout=args.restart_timeout,
    )
    app.run(load_options, config, args.host, args.port, args.slots, args.queue)
    return 0
