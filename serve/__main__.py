"""The `v4jax-serve` command."""

import argparse
import contextlib
import importlib.metadata
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4jax.commands import command_line, options
from v4jax.text.files import read_text, read_toml

if TYPE_CHECKING:
    from v4jax.language_model import LanguageModel

    from .service import Service

_EPILOG = """\
Options may also be in a TOML file: v4jax-serve --config serve.toml, with lines such as
  path = "DIR"
  max-seqs = 32
  adapter = ["NAME=DIR"]

exit status: 0 ended by SIGTERM or Ctrl+C, 1 failed, 2 misuse.

examples:
  v4jax-serve tiny
  v4jax-serve DIR --context 131072 --speculate mtp:2 --cache-dir cache
"""
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# Options that are the engine's settings.
_ENGINE_OPTIONS = (
    *("max_seqs", "memory", "queue", "speculate", "cache_dtype"),
    *("cache_ram", "cache_dir", "cache_disk", "routed_experts"),
)
# After the drain, for the last bytes to reach slow clients.
_CLOSE_SECONDS = 5
# Clients keep connections for later requests.
_IDLE_SECONDS = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is told to end.

    Returns:
      The exit status. Misuse raises SystemExit with 2, as argparse does.
    """
    with command_line.process("v4jax-serve"):
        try:
            args = read_arguments(list(sys.argv[1:] if argv is None else argv))
            return command_line.status(
                "v4jax-serve",
                lambda: _serve(args),
                interrupted=".",
                out_of_memory="try a smaller --context or --max-seqs.",
            )
        except ModuleNotFoundError as error:
            text = f"v4jax-serve: {error.name} is missing; pip install 'v4jax[serve]'"
            command_line.say(text)
            return 1


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The options, with those of the file before those of the command line."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    parser = _parser()
    config: dict[str, Any] = {}
    if (path := files.parse_known_args(words)[0].config) is not None:
        try:
            config = read_toml(path)
        except ValueError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"{path}: {error.strerror}")
    default = config.pop("path", None)
    args = parser.parse_args([*_words(config), *words])
    args.path = args.path or default
    if args.path is None:
        parser.error("the checkpoint is missing; pass its path")
    return args


def _words(config: dict[str, Any]) -> list[str]:
    """Options of a file, as on a command line."""
    words: list[str] = []
    for key, value in config.items():
        flag = f"--{key.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            words += [] if item is False else [flag] if item is True else [f"{flag}={item}"]
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="v4jax-serve",
        description="Serve a model through DeepSeek's, OpenAI's and Anthropic's HTTP interfaces.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"v4jax {importlib.metadata.version('v4jax')}"
    parser.add_argument("--version", action="version", version=version)
    source = "a Hugging Face directory, a native checkpoint, a Hub id, or 'tiny'"
    parser.add_argument("path", nargs="?", metavar="PATH", help=source)
    parser.add_argument("--config", metavar="FILE", help="a TOML file of options")
    _add_http(parser.add_argument_group("HTTP"))
    _add_engine(parser.add_argument_group("engine"))
    _add_model(parser.add_argument_group("model"))
    return parser


def _add_http(group: Any) -> None:
    add, whole = group.add_argument, options.integer(1)
    text = "address to listen on (default: 127.0.0.1, this machine only)"
    add("--host", default="127.0.0.1", help=text)
    add("--port", type=options.integer(0), default=8000, metavar="N", help="port (default: 8000)")
    add("--api-key-file", metavar="FILE", help="a file with an API key per line; one is needed")
    text = "name of the model; may be repeated (default: the checkpoint's)"
    add("--served-model-name", action="append", default=[], metavar="NAME", help=text)
    text = "refuse and ignore what DeepSeek's hosted API does"
    add("--strict-deepseek", action="store_true", help=text)
    text = "most time for an answer (default: 3600)"
    add("--request-seconds", type=whole, default=3600, metavar="N", help=text)
    text = "time for running answers when the server is told to end (default: 30)"
    add("--drain-seconds", type=options.integer(0), default=30, metavar="N", help=text)


def _add_engine(group: Any) -> None:
    add, whole = group.add_argument, options.integer(1)
    text = "answers that are computed at the same time (default: 16)"
    add("--max-seqs", type=whole, default=16, metavar="N", help=text)
    text = "most tokens of a prompt and its answer (default: 65536, or the model's own)"
    add("--context", type=whole, metavar="N", help=text)
    text = "memory of the cache, such as 12GiB (default: room for --max-seqs full answers)"
    add("--memory", type=_size, metavar="SIZE", help=text)
    text = "fp8 holds compressed entries in 60%% of the memory, with the same answers; needs dtype "
    add("--cache-dtype", choices=["fp8"], help=f"{text}bfloat16 (default: as --dtype)")
    text = "requests that may wait; more are refused (default: 1024)"
    add("--queue", type=whole, default=1024, metavar="N", help=text)
    add("--speculate", metavar="mtp:N", help="draft N tokens at a time with the MTP block")
    text = "let requests ask for the experts chosen for each token"
    flag = {"dest": "routed_experts", "action": "store_true"}
    add("--return-routed-experts", **flag, help=text)
    text = "RAM for prefixes that leave the device, such as 4GiB (default: none)"
    add("--cache-ram", type=_size, default=0, metavar="SIZE", help=text)
    add("--cache-dir", type=Path, metavar="DIR", help="directory that keeps prefixes, also later")
    text = "size of that directory (default: 64GiB)"
    add("--cache-disk", type=_size, default=64 * 2**30, metavar="SIZE", help=text)


def _add_model(group: Any) -> None:
    add = group.add_argument
    text = "also serve the model with this adapter, as NAME; may be repeated"
    add("--adapter", action="append", default=[], type=_adapter, metavar="NAME=PATH", help=text)
    text = "dtype of weights, activations and cache (default: bfloat16)"
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=text)
    text = "keep FP8 and FP4 weights quantised, to save memory"
    add("--keep-quantised", action="store_true", help=text)
    text = "shard the model over devices: auto, or sizes such as expert=8,tensor=4"
    add("--mesh", metavar="SIZES", help=text)
    options.add_revision(group)
    options.add_no_cache(group)


def _size(text: str) -> int:
    unit = text.lstrip("0123456789")
    if unit not in _UNITS or not text.removesuffix(unit).isascii() or unit == text:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 512MiB or 4GiB")
    return int(text.removesuffix(unit)) * _UNITS[unit]


def _adapter(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=PATH")
    return name, path


def _serve(args: argparse.Namespace) -> int:
    """Check what takes no time, then load the model and serve it."""
    keys = _read_keys(args.api_key_file)
    with _listen(args.host, args.port) as listener:
        host, port = listener.getsockname()[:2]
        if not keys and not ipaddress.ip_address(host).is_loopback:
            command_line.say(f"v4jax-serve: warning: anyone who reaches {host} can use the model.")
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        return _run(args, keys, listener, where)


def _run(
    args: argparse.Namespace, keys: tuple[str, ...], listener: socket.socket, where: str
) -> int:
    import uvicorn

    import v4jax
    from v4jax.engine.engine import Engine

    from . import app
    from .operations import Server

    model = v4jax.load(
        args.path,
        dtype=args.dtype,
        keep_quantised=args.keep_quantised,
        mesh=options.mesh_of(
            args,
            args.path,
            rows=args.max_seqs,
            context=args.context,
            cache_dtype=args.cache_dtype,
        ),
        revision=args.revision,
    )
    settings = {name: getattr(args, name) for name in _ENGINE_OPTIONS}
    settings["context"] = args.context or min(65536, model.config.max_position_embeddings)
    adapters = {name: model.with_adapter(path) for name, path in args.adapter}
    with Engine(model, adapters=adapters, **settings) as engine:
        service = _service(args, model, engine, keys)
        config = uvicorn.Config(
            app.create(service),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("v4jax").setLevel(logging.INFO)
        listener.listen()
        command_line.say(f"v4jax-serve: {service.names[0]} is ready at {where}")
        Server(config, service, args.drain_seconds).run(sockets=[listener])
    return 0


def _service(
    args: argparse.Namespace, model: "LanguageModel", engine: Any, keys: tuple[str, ...]
) -> "Service":
    from v4jax.engine.grammar import Grammars

    from .service import Limits, Service

    if model.tokenizer is None:
        raise ValueError(f"{args.path}: has no tokenizer.json; copy it there from the release.")
    names = tuple(args.served_model_name) or (Path(args.path).name,)
    adapters = tuple(name for name, _ in args.adapter)
    if len({*names, *adapters}) < len(names) + len(adapters):
        raise ValueError("Two of the served models have the same name; change --adapter.")
    eos_ids, vocab_size = model.config.eos_token_ids, model.config.vocab_size
    return Service(
        engine=engine,
        tokenizer=model.tokenizer,
        grammars=Grammars(model.tokenizer, vocab_size, eos_ids),
        vocab_size=vocab_size,
        eos_ids=eos_ids,
        revision=model.config.chat_revision,
        names=names,
        adapters=adapters,
        limits=Limits(context=engine.settings.context, seconds=args.request_seconds),
        fingerprint=f"fp_v4jax_{importlib.metadata.version('v4jax')}",
        strict=args.strict_deepseek,
        keys=keys,
    )


def _read_keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    keys = tuple(filter(None, map(str.strip, read_text(path).splitlines())))
    if not keys:
        raise ValueError(f"{path}: has no API keys; write one per line.")
    return keys


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; clients can connect once it listens."""
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            stack.pop_all()
            return listener
    except OSError as error:
        raise ValueError(f"{host}:{port}: {error.strerror}; choose --host and --port.") from None


if __name__ == "__main__":
    sys.exit(main())
