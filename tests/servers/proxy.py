"""A TCP proxy in front of a server, for network faults."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

from tests.servers.process import free_port, give_back

#: Bytes forwarded at a time.
CHUNK_BYTES = 1 << 16
#: Timeout of the connection to the server, and of the end of a thread (seconds).
TIMEOUT = 10.0
#: Linux socket option that Python does not define: attach a packet filter (struct sock_fprog) to a socket. The filter
#: below keeps 0 bytes of every packet that arrives.
SO_ATTACH_FILTER = 26
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)
DROP_ALL = struct.pack("HP", 1, ctypes.addressof(_DROP))


class Proxy:
    """Forwards TCP connections to a server, until a test calls `cut`, `strand`, `deafen` or `refuse`.

    Attributes:
        port: Its port on 127.0.0.1; the same after `refuse` and `heal`.
        accepted: How many connections it has accepted since it was created.

    After `cut`, both sides get no data and no error. A pulled cable differs in one point: here the kernel still
    acknowledges data and answers TCP keepalives. After `strand` it does not (on Linux).
    """

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.accepted = 0
        self._target = (target_host, target_port)
        self._state = threading.Condition()  # guards everything below
        self._mode: Literal["forward", "cut", "refuse"] = "refuse"
        self._links: set[_Link] = set()
        self._stranded: set[_Link] = set()
        self._waker: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> Self:
        """Begin to listen and forward."""
        self.heal()
        return self

    def through(self, url: str) -> str:
        """Return this URL with the address of the proxy."""
        parts = urlsplit(url)
        login = parts.netloc.rpartition("@")[0]
        address = f"{self.host}:{self.port}"
        return urlunsplit(parts._replace(netloc=f"{login}@{address}" if login else address))

    @property
    def open_connections(self) -> int:
        """The number of open connections, including those without data after `cut`."""
        with self._state:
            return len(self._links)

    def cut(self) -> None:
        """Forward no byte and no FIN. Connections stay open, and new ones are accepted."""
        with self._state:
            if self._mode == "refuse":
                raise RuntimeError("the proxy refuses connections: call heal() before cut()")
            self._mode = "cut"

    def strand(self) -> None:
        """Forward new connections only. The open connections never get another byte.

        A firewall that has lost its state does the same. On Linux the open connections do not even get an
        acknowledgement, so each side notices the loss only by its own keepalives or timeouts.
        """
        with self._state:
            lost = list(self._links)
            self._stranded.update(lost)
        if sys.platform == "linux":
            _drop_all(end for link in lost for end in (link.client, link.server))
        self.heal()

    def deafen(self) -> None:
        """Forward what clients send, but drop the answers of the server without an acknowledgement. Linux only."""
        with self._state:
            _drop_all(link.server for link in self._links)

    def lead_to(self, port: int) -> None:
        """Forward new connections to another port. Open connections stay with the old server."""
        self._target = (self._target[0], port)

    def refuse(self) -> None:
        """Close all connections and the listener. New connections are refused, as if the server were down."""
        with self._state:
            self._mode = "refuse"
            self._state.notify_all()
            links = list(self._links)
            if self._waker is not None:
                self._waker.close()  # the acceptor wakes up and closes the listener
                self._waker = None
            acceptor, self._acceptor = self._acceptor, None
        for link in links:
            link.break_off()
        for thread in (acceptor, *(link.thread for link in links)):
            if thread is not None:
                thread.join(TIMEOUT)

    def heal(self) -> None:
        """Forward again. Connections continue without loss after `cut`, as TCP does after a short outage."""
        with self._state:
            if self._mode == "refuse":
                self._listen()
            self._mode = "forward"
            self._state.notify_all()

    def close(self) -> None:
        """Do the same as `refuse`, and release the port."""
        self.refuse()
        give_back(self.port)

    def connect(self) -> socket.socket:
        """Open a connection to the server. Raises OSError."""
        server = socket.create_connection(self._target, TIMEOUT)
        server.settimeout(None)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return server

    def passes(self, link: _Link) -> bool:
        """Wait while the link is cut. Then return whether to forward (True) or to close the connections (False)."""
        with self._state:
            self._state.wait_for(
                lambda: self._mode == "refuse" or (self._mode == "forward" and link not in self._stranded)
            )
            return self._mode == "forward"

    def forget(self, link: _Link) -> None:
        """Remove this link from the open connections."""
        with self._state:
            self._links.discard(link)
            self._stranded.discard(link)

    def _listen(self) -> None:
        listener = socket.create_server((self.host, self.port))
        listener.setblocking(False)
        self._waker, woken = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, args=(listener, woken), name="proxy", daemon=True)
        self._acceptor.start()

    def _accept(self, listener: socket.socket, woken: socket.socket) -> None:
        with listener, woken:
            while woken not in select.select([listener, woken], [], [])[0]:
                try:
                    client, _ = listener.accept()
                except OSError:
                    continue  # the client has closed the connection
                client.setblocking(True)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link = _Link(self, client)
                with self._state:
                    self.accepted += 1
                    self._links.add(link)
                    link.thread.start()


class _Link:
    """The connection of a client and that to the server, with a thread for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self.client = client
        self.server: socket.socket | None = None
        self.thread = threading.Thread(target=self._serve, name="proxy up", daemon=True)

    def break_off(self) -> None:
        """Interrupt both threads. When both have ended, the sockets are closed."""
        _shut_down([self.client, self.server])

    def _serve(self) -> None:
        try:
            if self._proxy.passes(self):
                self.server = server = self._proxy.connect()
                down = threading.Thread(target=self._pump, args=(server, self.client), name="proxy down", daemon=True)
                down.start()
                self._pump(self.client, server)
                down.join()
        except OSError:
            pass  # the server is down: close the connection of the client
        finally:
            for end in (self.client, self.server):
                if end is not None:
                    end.close()
            self._proxy.forget(self)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Forward one direction until its end. If the end comes during `cut`, it is forwarded after `heal`."""
        try:
            while data := source.recv(CHUNK_BYTES):
                if not self._proxy.passes(self):
                    break
                sink.sendall(data)
            if self._proxy.passes(self):
                sink.shutdown(socket.SHUT_WR)  # the other direction may still have data
                return
        except OSError:
            self._proxy.passes(self)
        self.break_off()


def _shut_down(ends: Sequence[socket.socket | None]) -> None:
    for end in ends:
        if end is not None:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed already


def _drop_all(ends: Iterable[socket.socket | None]) -> None:
    """Let the kernel drop every packet that arrives at these sockets."""
    for end in ends:
        if end and end.fileno() >= 0:
            end.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, DROP_ALL)
