"""The web server of the studio: a token in every path, limits on what is uploaded, and nothing from other hosts."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

MAX_UPLOAD = 2**30  # bytes of a request; a video
HEADERS = {
    # Vue compiles templates in the browser, which needs 'unsafe-eval'; nothing comes from another host.
    b"content-security-policy": b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    b"frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI application that lets requests and websockets through whose path starts with a token.

    Attributes:
        app (Any): The application behind it.
    """

    def __init__(self, app: Any, token: str, once: str | None = None):
        """Initialize the guard.

        Args:
            app (Any): The application behind it.
            token (str): First part of every path.
            once (str, optional): Path that leads to the application the first time. Other users of the machine can read
                the URL with which a browser is started, and not where it leads.
        """
        self.app, self._token, self._once = app, token.encode(), once

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        status = self._refused(scope)
        if scope["type"] == "websocket":
            if status:
                await receive()
                await send({"type": "websocket.close", "code": 1008})  # before it is accepted, i.e. 403
            else:
                await self.app(scope, receive, send)
            return
        if status:
            headers = list(HEADERS.items())
            if self._once and hmac.compare_digest(scope["path"].encode("utf-8", "replace"), f"/{self._once}".encode()):
                self._once, status = None, 303
                headers.append((b"location", b"/%s/" % self._token))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers)

    def _refused(self, scope: MutableMapping[str, Any]) -> int:
        """Return the status of a refusal, or 0."""
        first = scope["path"].split("/")[1:2]
        if not first or not hmac.compare_digest(first[0].encode("utf-8", "replace"), self._token):
            return 403
        headers = dict(scope["headers"])
        if scope["type"] == "http" and scope["method"] not in {"GET", "HEAD"}:
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return 411
            if int(length) > MAX_UPLOAD:
                return 413
        return 0
