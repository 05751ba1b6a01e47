"""The doorkeeper of the web page: what gradio's server would answer beyond what the page needs, it does not.

gradio serves many routes (proxies, recordings, state on disk, monitoring) and takes bodies of any size. `Guard` stands in front
as ASGI middleware: known routes only, bodies of a known size, JSON that names no file but uploaded ones, few attempts at
passwords, no more jobs than may wait.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from urllib.parse import unquote

import anyio

from sonic.page_limits import Store

JSON_BYTES = 1_000_000
UPLOADS_AT_ONCE = 4  # files of the largest size in one request
LOGINS_PER_MINUTE = 20  # of all visitors together: behind a tunnel they all have one address
DEPTH = 32  # of JSON

PREFIX = "/gradio_api"
ROUTES = {
    "GET": re.compile(
        r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?|/logout|/(assets|static|svelte)/.+"
        rf"|{PREFIX}/(info/?|openapi\.json|app_id/?|user/?|token/?|login_check/?|startup-events|theme\.css|upload_progress|queue/data)"
        rf"|{PREFIX}/heartbeat/[^/]+|{PREFIX}/call/(v2/)?[^/]+/[^/]+|{PREFIX}/file=.+"
    ),
    "POST": re.compile(rf"/login/?|{PREFIX}/(upload|queue/join|cancel|reset/?)|{PREFIX}/call/(v2/)?[^/]+/?"),
}
ROUTES["HEAD"] = ROUTES["GET"]

ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),  # a file's address is its key
]
FILES = [
    *ALWAYS,
    (
        b"content-security-policy",
        b"sandbox; default-src 'none'; style-src 'unsafe-inline'",
    ),  # a visitor's file runs nothing
    (b"cache-control", b"private, no-store"),
]


class Guard:
    """ASGI middleware. `refuse(body, path)` gives the status and the sentence for what must not be asked for now."""

    def __init__(self, app, store: Store, refuse: Callable[[dict, str], tuple[int, str] | None]):
        self.app, self.store, self.refuse = app, store, refuse
        self._logins: deque[float] = deque()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        routes = ROUTES.get(method)
        if routes is None or not routes.fullmatch(path):
            await _answer(send, 404, "There is nothing here.")
            return
        headers = FILES if path.startswith(f"{PREFIX}/file=") else ALWAYS
        if headers is FILES and not self.store.holds(unquote(path.removeprefix(f"{PREFIX}/file="))):
            await _answer(send, 403, "This file is not served.")
            return
        if method == "POST":
            receive = await self._checked(scope, path, receive, send)
            if receive is None:
                return

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                names = {name for name, _ in headers}
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in names]
                message = {**message, "headers": [*kept, *headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    async def _checked(self, scope, path: str, receive, send):
        """What the body is received by, or None where the request was refused."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            await _answer(send, 411, "The length of the request must be said.")
            return None
        length = int(length)
        if path == f"{PREFIX}/upload":
            most = self.store.limits.max_upload_mb * 1e6
            if length > UPLOADS_AT_ONCE * most + JSON_BYTES:
                await _answer(send, 413, f"At most {most / 1e6:g} MB are taken here.")
            elif not await anyio.to_thread.run_sync(self.store.clean, length):
                await _answer(send, 507, "There is no room for files now: try again later.")
            else:
                return receive
            return None
        if length > JSON_BYTES:
            await _answer(send, 413, "The request is too large.")
            return None
        if path.rstrip("/") == "/login":
            if not self._may_log_in():
                await _answer(send, 429, "Too many attempts: try again in a minute.")
                return None
            return receive
        body, message = await _whole(receive)
        if body is None:
            return None  # the visitor left
        try:
            data = json.loads(body, parse_constant=_refuse)
            good = isinstance(data, dict) and all(self.store.covers(named) for named in _paths(data))
        except (ValueError, RecursionError):
            good = False
        if not good:
            await _answer(send, 400, "The request cannot be understood.")
            return None
        refusal = self.refuse(data, path)
        if refusal:
            await _answer(send, *refusal)
            return None
        return _once(message, receive)

    def _may_log_in(self) -> bool:
        now = time.monotonic()
        while self._logins and now - self._logins[0] > 60:
            self._logins.popleft()
        if len(self._logins) >= LOGINS_PER_MINUTE:
            return False
        self._logins.append(now)
        return True


def _refuse(constant: str):
    """NaN and infinities, which JSON does not have and Python's reader takes."""
    raise ValueError(constant)


def _paths(value, depth: int = 0) -> Iterator[str]:
    """Whatever gradio would take for the path of a file, in any corner of some JSON. ValueError: nested too deep."""
    if depth > DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield str(value["path"])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _paths(item, depth + 1)


async def _whole(receive) -> tuple[bytes | None, dict | None]:
    """The body, and as one message; None where the connection ended before."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None, None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            body = b"".join(parts)
            return body, {"type": "http.request", "body": body, "more_body": False}


def _once(message: dict, receive):
    """A `receive` that gives the message again, and then what comes after it."""
    pending = [message]

    async def again():
        return pending.pop() if pending else await receive()

    return again


async def _answer(send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    # The body may be unread: nothing else can be asked for on this connection.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *ALWAYS]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
