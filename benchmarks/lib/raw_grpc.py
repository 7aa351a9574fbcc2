"""Raw unary gRPC between processes: what a transfer of the same bytes takes when nothing is done with them.

One server process holds one message in memory and throws away what arrives; each client process fetches the bytes
and sends them, in messages of 2 MiB, four in flight. TLS and all channel options are Weft's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from lib.processes import finish, started, wait_for

from weft.client.transfer import IN_FLIGHT
from weft.common import wire
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.protocol import CHUNK_BYTES

Call: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"
ROUND_TRIPS_MAX = 200
BYTES_MIN = 300_000_000
"""What a client moves in all, unless that takes too many round trips."""


def raw_mb_s(directory: Path, num_bytes: int, num_clients: int) -> float:
    """MB/s of all clients together; each fetches and sends ``num_bytes``, again and again."""
    directory.mkdir()
    identity = CoordinatorIdentity.create_or_load(directory / "keys", ["localhost"], datetime.now(UTC))
    (directory / "ca.pem").write_text(identity.ca_pem)
    num_repeats = max(2, min(ROUND_TRIPS_MAX, BYTES_MIN // (2 * num_bytes)))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(process(directory, "server", str(num_bytes)))
        port = wait_for(directory / "server.log", r"port (\d+)\n", server)[1]
        names = [f"client-{number}" for number in range(num_clients)]
        arguments = (port, identity.tls_name, str(num_bytes), str(num_repeats))
        clients = [stack.enter_context(process(directory, name, *arguments)) for name in names]
        for name, client in zip(names, clients, strict=True):
            wait_for(directory / f"{name}.log", "ready", client)
        (directory / "go").touch()
        for client in clients:
            finish(client)
    spans = [json.loads((directory / f"{name}.log").read_text().splitlines()[-1]) for name in names]
    seconds: float = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return 2 * num_clients * num_repeats * num_bytes / 1e6 / seconds


def process(directory: Path, role: str, *arguments: str) -> Any:
    command = (__file__, str(directory), role, *arguments)
    return started(*command, log=directory / f"{role}.log", home=directory)


async def serve(directory: Path, num_bytes: int) -> None:
    chunk = bytes(min(num_bytes, CHUNK_BYTES))

    async def get(_: bytes, __: Any) -> bytes:
        return chunk

    async def put(_: bytes, __: Any) -> bytes:
        return b""

    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Get": grpc.unary_unary_rpc_method_handler(get),
        "Put": grpc.unary_unary_rpc_method_handler(put),
    }
    leaf = CoordinatorIdentity.create_or_load(directory / "keys", ["localhost"], datetime.now(UTC)).leaf
    server = grpc.aio.server(options=wire.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Raw", handlers),))
    credentials = grpc.ssl_server_credentials([(leaf.key_pem.encode(), leaf.chain_pem.encode())])
    print("port", server.add_secure_port("127.0.0.1:0", credentials), flush=True)
    await server.start()
    await server.wait_for_termination()


@contextlib.contextmanager
def connected(directory: Path, port: str, tls_name: str) -> Iterator[grpc.Channel]:
    credentials = grpc.ssl_channel_credentials((directory / "ca.pem").read_bytes())
    options = (*wire.CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", tls_name))
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
        yield channel


def move(directory: Path, port: str, tls_name: str, num_bytes: int, num_repeats: int) -> tuple[float, float]:
    """Fetch and send the bytes; when that began and ended."""
    chunks = [bytes(min(CHUNK_BYTES, num_bytes - start)) for start in range(0, num_bytes, CHUNK_BYTES)]
    with connected(directory, port, tls_name) as channel, ThreadPoolExecutor(IN_FLIGHT) as pool:
        get: Call = channel.unary_unary("/Raw/Get")
        put: Call = channel.unary_unary("/Raw/Put")
        put(b"")
        print("ready", flush=True)
        while not (directory / "go").exists():
            time.sleep(0.005)
        begin = time.time()
        for _ in range(num_repeats):
            for call, requests in ((get, [b""] * len(chunks)), (put, chunks)):
                for _ in pool.map(call, requests):
                    pass
        return begin, time.time()


def main() -> None:
    """Be the server or a client, as the command line says."""
    directory, role, *arguments = sys.argv[1:]
    if role == "server":
        # Nothing to end in order.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        asyncio.run(serve(Path(directory), int(arguments[0])))
    else:
        port, tls_name, num_bytes, num_repeats = arguments
        print(json.dumps(move(Path(directory), port, tls_name, int(num_bytes), int(num_repeats))), flush=True)


if __name__ == "__main__":
    main()
