"""`devmon serve RUN`: the report of a run that is still being written, served to this machine alone.

It answers one path, "/", with the page in memory; no file is read for a request, so no path leads outside. It listens
on 127.0.0.1 and refuses requests that name another host, so that no web page can read it through a changed DNS entry.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOST = "127.0.0.1"
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class Live:
    """The page, made again by `make` whenever `state` changes; the old page stays where that fails.

    `state` says what is committed, such as the steps of each watch, and is asked every `every` seconds.
    """

    def __init__(self, state: Callable[[], object], make: Callable[[], str], every: float = 5.0):
        self.state, self.make, self.every = state, make, every
        self.page = waiting("reading the run", every)
        self.error = ""
        self.seen: object = None

    def update(self) -> bool:
        """Make the page again if there is news; whether there was. Errors are kept as text, in `error`."""
        try:
            now = self.state()
            if now == self.seen:
                return False
            self.page, self.seen, self.error = self.make(), now, ""
        except Exception as error:  # a store that is not there yet, or caught between two writes
            self.error = f"{type(error).__name__}: {error}"
            if self.seen is None:
                self.page = waiting(self.error, self.every)
            return False
        return True

    def follow(self, stop: threading.Event, tell: Callable[[str], None]) -> None:
        """Update until `stop` is set; `tell` gets a line for every new page and every new error."""
        last = ""
        while not stop.is_set():
            if self.update():
                tell(f"page of {len(self.page.encode()):,} bytes")
            if self.error != last and self.error:
                tell(self.error)
            last = self.error
            stop.wait(self.every)


def server(live: Live, port: int = 0) -> ThreadingHTTPServer:
    """A server on localhost at this port (0: any free one) that has nothing but the page."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "devmon", ""

        def do_GET(self) -> None:
            name = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
            if name not in (HOST, "localhost"):
                self.send_error(403)
            elif self.path != "/":
                self.send_error(404)
            else:
                body = live.page.encode()
                self.send_response(200)
                for key, value in {**HEADERS, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer((HOST, port), Handler)


def waiting(text: str, every: float) -> str:
    """The page before there is a report."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{every:g}">'
        f"<title>devmon</title></head><body><p>{html.escape(text)}</p></body></html>"
    )
