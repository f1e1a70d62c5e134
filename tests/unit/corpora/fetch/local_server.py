"""A web server on this machine that serves files well or badly, as told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Served:
    """What is served, how, and what was asked.

    ``die_after``: bytes after which the connection breaks, once for each entry. ``ranges``: whether Range is known.
    ``if_range``: whether If-Range is. ``failures``: so many answers of HTTP 503 come first.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.etags: dict[str, str] = {}
        self.die_after: list[int] = []
        self.ranges = True
        self.if_range = True
        self.failures = 0
        self.asked: list[tuple[str, str, str | None]] = []
        self.url = ""


@contextmanager
def serving() -> Iterator[Served]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path, asked_range = self.path.split("?")[0], self.headers.get("Range")
            served.asked.append((self.command, path, asked_range))
            if served.failures > 0:
                served.failures -= 1
                self.send_error(503)
                return
            if path not in served.files:
                self.send_error(404)
                return
            body, start = served.files[path], 0
            etag = served.etags.get(path)
            same = not served.if_range or self.headers.get("If-Range") in (None, etag)
            if asked_range is not None and served.ranges and same:
                start = int(asked_range.removeprefix("bytes=").split("-")[0])
                if start >= len(body):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if etag is not None:
                self.send_header("ETag", etag)
            for name, value in served.headers.get(path, {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if not with_body:
                return
            if served.die_after:
                self.wfile.write(body[start : start + served.die_after.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(body[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
