"""Selftest of the proxy: forward, cut, refuse, heal."""

from __future__ import annotations

import errno
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
import redis as redis_package

from tests.conftest import StartProxy, StartServer
from tests.servers import Proxy, RedisServer, RunFolder

#: Seconds without an answer that a test takes for silence.
SILENCE = 0.3
#: Seconds for an answer that must come.
TIMEOUT = 10.0


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of an echo server. It closes a connection when the client does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(client: socket.socket) -> None:
        with client:
            while data := client.recv(1 << 16):
                client.sendall(data)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def connect(proxy: Proxy) -> socket.socket:
    """A client of the proxy with a timeout."""
    return socket.create_connection((proxy.host, proxy.port), TIMEOUT)


def exchange(client: socket.socket, data: bytes) -> bytes:
    """What comes back for this."""
    client.sendall(data)
    received = b""
    while len(received) < len(data):
        received += client.recv(1 << 16)
    return received


def test_it_forwards_and_counts(echo: int, start_proxy: StartProxy) -> None:
    """More bytes than fit into any buffer pass in both directions, and connections are counted."""
    proxy = start_proxy(echo)
    with connect(proxy) as one, connect(proxy) as two:
        assert exchange(one, b"one") == b"one"
        assert exchange(two, b"two") == b"two"
        assert (proxy.accepted, proxy.open_connections) == (2, 2)
        data = bytes(range(256)) * 10_000
        sender = threading.Thread(target=one.sendall, args=(data,))
        sender.start()
        received = b""
        while len(received) < len(data):
            received += one.recv(1 << 16)
        sender.join()
        assert received == data


def test_the_end_of_a_client_passes(echo: int, start_proxy: StartProxy) -> None:
    """A client that closes its sending side still gets the rest. Then the connection is not counted any more."""
    proxy = start_proxy(echo)
    with connect(proxy) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b"last words"
        assert client.recv(100) == b""
    assert proxy.accepted == 1


def test_cut_is_silent_and_heal_loses_nothing(echo: int, start_proxy: StartProxy) -> None:
    """After `cut` no data and no end of the connection arrive. After `heal` the data arrive."""
    proxy = start_proxy(echo)
    with connect(proxy) as client:
        assert exchange(client, b"before") == b"before"
        proxy.cut()
        client.sendall(b"during")
        client.settimeout(SILENCE)
        with pytest.raises(TimeoutError):
            client.recv(100)
        client.settimeout(TIMEOUT)
        proxy.heal()
        assert client.recv(100) == b"during"


def test_cut_accepts_new_connections_and_says_nothing(echo: int, start_proxy: StartProxy) -> None:
    """A connection during `cut` is accepted and gets no data until `heal`."""
    proxy = start_proxy(echo)
    proxy.cut()
    with connect(proxy) as client:
        client.sendall(b"hello")
        client.settimeout(SILENCE)
        with pytest.raises(TimeoutError):
            client.recv(100)
        client.settimeout(TIMEOUT)
        proxy.heal()
        assert client.recv(100) == b"hello"


def test_no_end_passes_a_cut(start_proxy: StartProxy) -> None:
    """If a client closes during `cut`, the server notices it after `heal`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = start_proxy(listener.getsockname()[1])
        client = connect(proxy)
        client.sendall(b"x")
        server, _ = listener.accept()
        with server:
            server.settimeout(TIMEOUT)
            assert server.recv(1) == b"x"
            proxy.cut()
            client.close()
            server.settimeout(SILENCE)
            with pytest.raises(TimeoutError):
                server.recv(1)
            server.settimeout(TIMEOUT)
            proxy.heal()
            assert server.recv(1) == b""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel goes on to answer")
def test_stranded_not_even_keepalives_are_answered(echo: int, start_proxy: StartProxy) -> None:
    """After `strand` the keepalives of the owner close the connection. A new connection works."""
    proxy = start_proxy(echo)
    with connect(proxy) as client:
        assert exchange(client, b"before") == b"before"
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
            client.setsockopt(socket.IPPROTO_TCP, option, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        proxy.cut()
        proxy.strand()
        with connect(proxy) as another:
            assert exchange(another, b"after") == b"after"
        with pytest.raises(TimeoutError) as failed:
            client.recv(100)
        assert failed.value.errno == errno.ETIMEDOUT


def test_refuse_closes_and_heal_opens_the_same_port(echo: int, start_proxy: StartProxy) -> None:
    """`refuse` closes all connections, also after `cut`, and rejects new ones until `heal`."""
    proxy = start_proxy(echo)
    with connect(proxy) as client:
        assert exchange(client, b"before") == b"before"
        proxy.cut()
        proxy.refuse()
        try:
            assert client.recv(100) == b""
        except ConnectionResetError:
            pass  # as good an end
    assert proxy.open_connections == 0
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as client:
        assert exchange(client, b"after") == b"after"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a socket hold a port for another")
def test_a_port_is_held_while_nobody_listens_on_it(echo: int, start_proxy: StartProxy) -> None:
    """Another test run cannot get the port meanwhile. After `close` it is free."""
    proxy = start_proxy(echo)
    proxy.refuse()
    with socket.socket() as another, pytest.raises(OSError, match="in use"):
        another.bind((proxy.host, proxy.port))
    proxy.heal()
    with connect(proxy) as client:
        assert exchange(client, b"hello") == b"hello"
    ended = start_proxy(echo)  # without a connection, which would linger at the port
    ended.close()
    with socket.socket() as another:
        another.bind((ended.host, ended.port))


def test_a_server_that_is_down_ends_the_client(start_proxy: StartProxy) -> None:
    """Without a server, the proxy closes the connection of the client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with connect(start_proxy(port)) as client:
        assert client.recv(1) == b""


def test_a_url_goes_through_it(run_folder: RunFolder, start_server: StartServer, start_proxy: StartProxy) -> None:
    """`through` keeps login and database of a URL."""
    server = start_server(RedisServer(run_folder))
    proxy = start_proxy(server.port)
    with server.client(2) as client:
        client.set("where", "database 2")
    with redis_package.Redis.from_url(proxy.through(server.url(2))) as client:
        assert client.get("where") == b"database 2"
