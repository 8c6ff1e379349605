"""The report of a sweep over HTTP: read from storage at each request, for this machine only."""

import contextlib
import mimetypes
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from dis_scale.process.errors import DisScaleError
from dis_scale.report.files import PAGE
from dis_scale.storage.folder import Folder

LOOPBACK = "127.0.0.1"


class _Handler(BaseHTTPRequestHandler):
    """Answers with the files of one folder, not of folders below it."""

    def __init__(self, folder: Folder, *connection: Any) -> None:
        self._folder = folder
        self._port = connection[2].server_port
        super().__init__(*connection)

    def do_GET(self) -> None:
        if self.headers["Host"] not in {f"{name}:{self._port}" for name in (LOOPBACK, "localhost")}:
            return self.send_error(HTTPStatus.MISDIRECTED_REQUEST)  # another site, whose host name points here
        name = unquote(self.path.partition("?")[0]).removeprefix("/") or PAGE
        try:
            data = self._folder.read(name) if name in self._folder.list() else None
        except (DisScaleError, FileNotFoundError) as error:
            return self.send_error(HTTPStatus.BAD_GATEWAY, explain=str(error))
        if data is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", mimetypes.guess_type(name)[0] or "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the browser left
                self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Log nothing: errors are in the answers."""


def serve(folder: Folder, say: Callable[[str], None]) -> None:
    """Serve a report's folder at a free port until it is interrupted."""
    with ThreadingHTTPServer((LOOPBACK, 0), partial(_Handler, folder)) as server:
        taken = server.server_address[1]
        say(f"serving  http://{LOOPBACK}:{taken}")
        say(f"         until Ctrl-C; from another machine first: ssh -L {taken}:{LOOPBACK}:{taken} HOST")
        server.serve_forever()
