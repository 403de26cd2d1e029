"""HTTP/1.1 connections for uvicorn that limit the data a client may send or leave unread."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from hvdrec.serving.bodies import DRAINED_BODIES, long_body
from hvdrec.serving.connections import Connections
from hvdrec.serving.options import Options
from hvdrec.serving.problems import Problem, unavailable

KEEP_ALIVE_SECONDS = 75
"""Time after which an idle connection is closed. Load balancers close their idle connections
earlier, so they never send a request on a connection that is just being closed."""
LINGER_SECONDS = 2.0
LINGER_BYTES = 1 << 20
"""After a refusal, up to this much more input is read and discarded. If input were left unread, the
operating system would reset the connection, and the client might not see the refusal."""
SLOWEST_READER = 10 * 1024
"""Lowest accepted speed at which a client reads responses, in bytes per second."""
SLICE = 8192
"""Number of bytes parsed at a time. Pipelined requests in the rest of the input wait unparsed,
since parsed requests take more memory."""


class GuardedProtocol(HttpToolsProtocol):
    """A connection that is closed if its client exceeds a limit, to protect all other clients."""

    deadline: float = math.inf

    def __init__(
        self,
        options: Options,
        *,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Create a connection; the application puts its `Connections` into ``app_state``."""
        super().__init__(config, server_state, app_state, _loop)
        self._options = options
        self._connections: Connections = app_state["connections"]
        self._most_bytes = options.max_header + DRAINED_BODIES * options.max_body
        self._messages = 0
        self._is_receiving = False  # True while a request has begun and is not complete
        self._is_in_header = False
        self._is_header_checked = False
        self._fed = 0  # bytes of this request, without those received along with the previous one
        self._held = b""  # input that is not parsed yet
        self._problem: Problem | None = None  # the refusal that ends the connection
        self._parser_problem = Problem(400, "not a valid HTTP/1.1 request")
        self._discarded = 0

    @property
    def address(self) -> str:
        """IP address of the client."""
        return self.client[0] if self.client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the client, or refuse it if there are too many connections."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self)
        self.deadline = self.loop.time() + self._options.header_wait
        if not self._connections.add(self):
            self._refuse(unavailable("overloaded: too many connections; try again"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        self._connections.remove(self)
        self._held = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse new input, or keep it unparsed while earlier requests wait for their response."""
        if self._problem is not None:
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self.transport.abort()
            return
        if self._held:
            self._held += data
            return
        for start in range(0, len(data), SLICE):
            if self.pipeline:
                self._held = data[start:]
                self.flow.pause_reading()
                return
            self._parse(data[start : start + SLICE])
            if self._problem is not None or self.transport.is_closing():
                return

    def _parse(self, data: bytes) -> None:
        message, was_receiving = self._messages, self._is_receiving
        # A header that arrives whole in one short chunk cannot be too long.
        self._is_header_checked = was_receiving or len(data) > self._options.max_header
        super().data_received(data)
        if not (was_receiving and self._is_receiving and message == self._messages):
            return
        self._fed += len(data)
        if self._is_in_header and self._fed > self._options.max_header:
            self._refuse(self._long_header())
        elif self._fed > self._most_bytes:  # includes trailers and chunk extensions
            self._refuse(long_body(self._options.max_body))

    def on_message_begin(self) -> None:
        """Record that a request begins, and set the deadline for its header."""
        super().on_message_begin()
        self._messages += 1
        self._fed = 0
        self._is_receiving = self._is_in_header = True
        if self.cycle is not None:  # the first request's deadline was set on connection
            self._set_deadline()

    def on_headers_complete(self) -> None:
        """Start a request whose header is complete and within the limit."""
        if self._is_header_checked:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self._options.max_header:
                self._parser_problem = self._long_header()
                raise ValueError  # stops the parser
        super().on_headers_complete()
        self._is_in_header = False
        self.headers = deque(maxlen=0)  # type: ignore[assignment]  # discards trailers
        if self._connections.is_draining:
            self.cycle.keep_alive = False
        self._set_deadline()

    def on_message_complete(self) -> None:
        """Record that a request has arrived completely."""
        self._is_receiving = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the next pipelined request, or wait for one."""
        super().on_response_complete()
        if not self.pipeline and not self.transport.is_closing():
            if self._problem is not None:
                self._refuse(self._problem)
            elif self._held:
                held, self._held = self._held, b""
                self.data_received(held)
                self.flow.resume_reading()
        self._set_deadline()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not valid HTTP or whose header is too long."""
        self._refuse(self._parser_problem)

    def shutdown(self) -> None:
        """Close the connection: at once if it is idle, else after the response in progress."""
        if not self._is_in_header:
            super().shutdown()

    def pause_writing(self) -> None:
        """Set a deadline, because the client does not read its responses."""
        super().pause_writing()
        self._set_deadline()

    def resume_writing(self) -> None:
        """Update the deadline, because the client reads again."""
        super().resume_writing()
        self._set_deadline()

    def expire(self) -> None:
        """End the connection because its deadline has passed."""
        is_ending = self._problem is not None or self.transport.is_closing()
        if is_ending or self.flow.write_paused or (self._is_receiving and not self._is_in_header):
            self.transport.abort()
        elif self._is_in_header:
            wait = self._options.header_wait
            self._refuse(Problem(408, f"the header did not arrive within {wait:g} s"))
        else:
            self.transport.close()

    def evict(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def close_after_response(self) -> None:
        """Close the connection as soon as the requests in progress are answered."""
        if self._is_answering:
            self.cycle.keep_alive = False

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _set_deadline(self) -> None:
        if self._problem is not None and not self._is_answering:
            return  # `_refuse` has set it
        now, wait = self.loop.time(), self._options.header_wait
        if self.flow.write_paused or self.transport.is_closing():
            self.deadline = now + wait + self.transport.get_write_buffer_size() / SLOWEST_READER
        elif self._is_answering:
            self.deadline = math.inf
        else:
            self.deadline = now + (wait if self._is_receiving else KEEP_ALIVE_SECONDS)

    def _refuse(self, problem: Problem) -> None:
        """Answer earlier requests, then send the error and close the connection."""
        self._problem = problem
        self._held = b""
        is_body = self._is_receiving and not self._is_in_header
        if self._is_answering:
            if not is_body or self.pipeline or self.cycle.response_started:
                return  # `on_response_complete` calls this method again
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            is_body = False
        if not is_body:  # if the fault is in a body, the request has already been answered
            self._write(problem)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.deadline = self.loop.time() + LINGER_SECONDS

    def _write(self, problem: Problem) -> None:
        response = problem.response()
        headers = {**dict(response.raw_headers), b"connection": b"close"}
        head = [name + b": " + value + b"\r\n" for name, value in headers.items()]
        content = [STATUS_LINE[problem.status], *head, b"\r\n", bytes(response.body)]
        self.transport.write(b"".join(content))

    def _long_header(self) -> Problem:
        text = f"the header has more than {self._options.max_header} bytes; send fewer headers"
        return Problem(431, text)


class _Flow(FlowControl):
    """Pauses reading from a connection while earlier requests on it wait for their response."""

    def __init__(self, transport: asyncio.Transport, protocol: GuardedProtocol) -> None:
        super().__init__(transport)
        self._protocol = protocol

    def resume_reading(self) -> None:
        if not self._protocol.pipeline and not self._protocol._held:
            super().resume_reading()
