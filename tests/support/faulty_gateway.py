"""Proxy between a client and an S3 gateway that records each request and injects faults."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


Fault = int | str | tuple[int, str]


class Gateway(ThreadingHTTPServer):
    """Forwards requests to `port`. Each of `faults` is used once, for the next request for which `concerns` is true; None is none.

    A number is the status of the response, a tuple its status and error code. "cut" sends half of the response, "closed" none,
    "hangs" none until the server ends; "lost" does what was requested and sends no answer.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port, self.seen = port, list[Request]()
        self.faults: list[Fault | None] = []
        self.concerns: Callable[[Request], bool] = lambda _: True
        self.ending = threading.Event()
        self._one_at_a_time = threading.Lock()

    def fault_for(self, request: Request) -> Fault | None:
        with self._one_at_a_time:
            self.seen.append(request)
            return self.faults.pop(0) if self.faults and self.concerns(request) else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault_for(Request(self.command, self.path, self.headers.get("Range")))
        if fault == "hangs":
            self.server.ending.wait()
        if fault in ("closed", "hangs"):
            self.close_connection = True
        elif isinstance(fault, int | tuple):
            status, code = fault if isinstance(fault, tuple) else (fault, "InternalError")
            self._answer(status, {}, f"<Error><Code>{code}</Code><Message>injected fault</Message></Error>".encode())
        else:
            self._forward(body, str(fault))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forward(self, body: bytes, fault: str) -> None:
        upstream = HTTPConnection("127.0.0.1", self.server.upstream_port)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
        headers.setdefault("Content-Length", str(len(data)))
        if fault != "lost":
            self._answer(answer.status, headers, data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection |= fault in ("cut", "lost")
        upstream.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def before(port: int) -> Iterator[Gateway]:
    """Run a proxy in front of the gateway at `port` for the block."""
    server = Gateway(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
