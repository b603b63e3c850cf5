"""Servers of this machine for files that lie elsewhere."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Counting(http.server.SimpleHTTPRequestHandler):
    """As Python's own server is, which knows no ranges."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        del format, args  # a test is quiet


class Ranged(Counting):
    """As the servers of object stores are; what was asked for is told with the number of bytes given."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        self.asked.append(f"{self.path} {len(part)}")
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asked may have been killed meanwhile."""


@contextmanager
def served(folder: Path, kind: type[Counting] = Counting) -> Iterator[tuple[str, list[str]]]:
    """The address under which the files below `folder` are, and what has been asked for."""
    asked: list[str] = []
    handler = type("Handler", (kind,), {"asked": asked})
    with Quiet(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()
