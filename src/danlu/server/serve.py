"""`danlu serve`: check what can be checked, then serve until a signal comes."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import disable_created_metrics

from danlu import __version__, files
from danlu.adapters.peft_config import read_peft_config
from danlu.config import validate
from danlu.console import note
from danlu.errors import DanluError
from danlu.hub.sources import parse_source
from danlu.server.access.data_folder import data_folder, key_file_path
from danlu.server.app import create_app
from danlu.server.config import ServeConfig, is_loopback, named_adapters, named_models
from danlu.server.operation.connections import BACKLOG, ROOM_TO_REFUSE, uvicorn_config
from danlu.server.operation.drain import DrainingServer
from danlu.server.operation.log_format import log, set_up_logs

if TYPE_CHECKING:
    from danlu.server.operation.tracing import Tracing

OWN_FILES = 256
"""Open files beside connections: the database, models, logs."""


def serve(config: ServeConfig) -> None:
    """Serve models over HTTP until SIGTERM (then it returns) or Ctrl-C.

    Raises:
        DanluError: it cannot start as it was asked to, or the first model cannot be loaded.
        KeyboardInterrupt: Ctrl-C, after what ran has ended.
    """
    config = validate(config)
    set_up_logs(config.log_format)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series, and resets show without them
    _require_keys(config)
    _require_models(config)
    _require_writable(data_folder(config.data))
    with contextlib.ExitStack() as open_until_the_end:
        sockets = [open_until_the_end.enter_context(one) for one in _listen(config.host, config.port)]
        _raise_file_limit(config.max_connections)
        tracing = _open_tracing(config)
        if tracing is not None:
            open_until_the_end.callback(tracing.close)
        failures: list[DanluError] = []

        def failed(error: DanluError) -> None:
            failures.append(error)
            server.should_exit = True

        app = create_app(config, tracing=tracing, failed=failed)
        server = DrainingServer(
            uvicorn_config(config, app),
            state=app.state,
            drain=config.drain,
            started=partial(_announce, config, sockets[0].getsockname()[1]),
            draining=partial(_tell_systemd, "STOPPING=1"),
            cut_off=app.state.serving.models.close,
        )
        server.run(sockets)
    if failures:
        raise failures[0]
    if server.ended_by is signal.SIGINT:
        raise KeyboardInterrupt


def _require_keys(config: ServeConfig) -> None:
    """Whoever can reach the server may use it, if there are no keys: only this machine may, unless it is wanted."""
    keys = key_file_path(config.api_key_file, config.data)
    if not is_loopback(config.host) and not config.public_without_keys and not keys.exists():
        raise DanluError(
            f"host: {config.host} can be reached from other machines, and there are no API keys ({keys} does not "
            "exist); make one with `danlu keys create NAME`, or let everybody in with --public-without-keys"
        )


def _require_models(config: ServeConfig) -> None:
    """What is no path and no source, or no adapter, is told now, not when it is asked for."""
    for source in named_models(config.model).values():
        parse_source(source)
    for adapter in named_adapters(config):
        read_peft_config(adapter.folder)


def _require_writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DanluError(f"{folder}: is a file, not a folder; choose another --data")
    try:
        files.require_writable(folder)
    except DanluError as error:
        raise DanluError(str(error).replace("another --out", "another --data")) from error


def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on all addresses of a host. From here on nobody else can have the port, and clients may already queue."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise DanluError(f"host: {host!r} is no address of this machine ({error})") from error
    sockets: list[socket.socket] = []
    for family, _, protocol, _, address in dict.fromkeys(found):
        where = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
        # asyncio turns off Nagle's algorithm, which holds small writes back for 40 ms, where the protocol is named.
        one = socket.socket(family, socket.SOCK_STREAM, protocol)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(where)
            one.listen(BACKLOG)
        except OSError as error:
            for opened in (one, *sockets):
                opened.close()
            raise DanluError(
                f"port: {host}:{port} cannot be listened on ({error.strerror or error}); "
                "choose another --port (0 takes a free one), or end what uses it"
            ) from error
        sockets.append(one)
    return sockets


def _raise_file_limit(connections: int) -> None:
    """A connection is an open file; many systems give a process 1,024 until it asks for more."""
    needed = connections + ROOM_TO_REFUSE + OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        if allowed < needed:
            log.warning("max_connections: %d need more open files than the %d allowed (ulimit -n)", connections, hard)


def _open_tracing(config: ServeConfig) -> Tracing | None:
    if config.traces is None:
        return None
    from danlu.server.operation.tracing import Tracing  # an extra

    return Tracing(config.traces)


def _announce(config: ServeConfig, port: int) -> None:
    """Say where everything is."""
    names = ", ".join([*named_models(config.model), *(adapter.name for adapter in named_adapters(config))])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(config.host, config.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    _tell_systemd("READY=1")
    if config.log_format == "json":
        log.info("serving", extra={"fields": {"url": url, "host": config.host, "models": names}})
        return
    lines = [f"danlu {__version__} serves {names}; Ctrl-C stops it"]
    lines += [f"  page  {url}/"] if config.page else []
    lines += [f"  API   {url}/v1", f"  docs  {url}/openapi.json"]
    note("\n".join(lines))


def _tell_systemd(state: str) -> None:
    """The protocol of sd_notify(3): a datagram to the socket that a unit of Type=notify names."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one, contextlib.suppress(OSError):
        one.connect("\0" + address[1:] if address.startswith("@") else address)
        one.sendall(state.encode())
