"""The processes of a run meet before JAX connects them, and notice when one of them ends.

JAX's own connection ends a process without a name if others do not come. So first each process
announces itself to process 0 at the coordinator's address; when all have come, JAX's coordinator
takes over the port. The connections stay: a process that dies closes its own, at the latest when it
no longer answers TCP's keepalive.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_LINE = 65536  # the longest message in bytes
_PAUSE = 0.5  # seconds between attempts to connect
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_LISTED = 8  # processes that a message names


class ClusterError(ValueError):
    """The processes of a run cannot meet."""


class Ended(NamedTuple):
    """A process that ended before the run did.

    Attributes:
      process: its index.
      host: its host.
      stalled: whether it ended because it made no progress.
    """

    process: int
    host: str
    stalled: bool


class Peers:
    """The other processes of a run; process 0 is connected to all, the others to process 0."""

    def __init__(self, process: int, connections: dict[int, "_Connection"]) -> None:
        self._process = process
        self._connections = connections
        self._lock = threading.Lock()

    def watch(self, ended: Callable[[Ended], None]) -> None:
        """Call a function, in a thread of its own, when a process ends without `leave`."""
        threading.Thread(target=self._watch, args=(ended,), daemon=True, name="peers").start()

    def leave(self) -> None:
        """Tell the others that this process is about to end as it should."""
        self._tell({"leaves": True})

    def stalled(self) -> None:
        """Tell the others that this process is about to end for lack of progress."""
        self._tell({"ended": [self._process, socket.gethostname(), True]})

    def _tell(self, message: dict[str, Any], besides: int | None = None) -> None:
        with self._lock:
            for process, connection in self._connections.items():
                if process != besides:
                    with contextlib.suppress(OSError):
                        connection.send(message)

    def _watch(self, ended: Callable[[Ended], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for process, connection in self._connections.items():
                connection.socket.settimeout(None)
                selector.register(connection.socket, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    connection = self._connections[key.data]
                    message = connection.receive()
                    if message.get("leaves"):
                        selector.unregister(connection.socket)
                        continue
                    end = Ended(*message.get("ended", (key.data, connection.host, False)))
                    self._tell({"ended": list(end)}, besides=key.data)
                    ended(end)
                    return


class _Connection:
    """A connection that carries messages, each a line of JSON."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.host = ""
        self._file = connected.makefile("rb")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(f"{json.dumps(message)}\n".encode())

    def receive(self) -> dict[str, Any]:
        """The next message; empty if the connection has ended or the line is no message."""
        try:
            message = json.loads(self._file.readline(_LINE))
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) else {}

    def reject(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            self.send({"error": reason})
        self.close()

    def close(self) -> None:
        self._file.close()
        # Other threads may still read: end the connection itself.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def is_open(self) -> bool:
        """Whether the other side is still connected; it has sent nothing."""
        try:
            self.socket.setblocking(False)
            return self.socket.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self.socket.setblocking(True)


def meet(
    coordinator: str, process: int, processes: int, *, timeout: float, hosts: Sequence[str] = ()
) -> Peers:
    """Wait until all processes of a run have announced themselves to process 0.

    Args:
      coordinator: HOST:PORT of process 0.
      process: index of this process.
      processes: number of processes.
      timeout: seconds to wait.
      hosts: the host of each process, if known, for messages.

    Raises:
      ClusterError: processes are missing, or two have the same index.
    """
    deadline = time.monotonic() + timeout
    host, _, port = coordinator.rpartition(":")
    if process == 0:
        return Peers(0, _gather(int(port), processes, deadline, timeout, hosts))
    connection = _connect(host.strip("[]"), int(port), deadline, timeout)
    connection.send({"process": process, "processes": processes, "host": socket.gethostname()})
    # Process 0 reports missing processes at its own deadline, which may be later than this one.
    connection.socket.settimeout(2 * timeout)
    answer = connection.receive()
    if "host" not in answer:
        connection.close()
        reason = answer.get("error", f"Process 0 at {coordinator} has ended; see its messages.")
        raise ClusterError(reason)
    connection.host = answer["host"]
    return Peers(process, {0: connection})


def _connect(host: str, port: int, deadline: float, timeout: float) -> _Connection:
    while True:
        try:
            return _Connection(socket.create_connection((host, port), timeout=5.0))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Process 0 at {host}:{port} has not answered for {timeout:.0f} s"
                    f" ({error.strerror or error}). Is it running, is this its address, and can"
                    " this host reach the port?"
                ) from None
        time.sleep(_PAUSE)


def _gather(
    port: int, processes: int, deadline: float, timeout: float, hosts: Sequence[str]
) -> dict[int, _Connection]:
    """The connections of all other processes, by index."""
    arrived: dict[int, _Connection] = {}
    try:
        with _listener(port) as listener:
            while len(arrived) < processes - 1:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection = _Connection(listener.accept()[0])
                except TimeoutError:
                    raise ClusterError(_missing(processes, arrived, timeout, hosts)) from None
                _admit(connection, processes, arrived)
    except ClusterError as error:
        for connection in arrived.values():
            connection.reject(str(error))
        raise
    for connection in arrived.values():
        connection.send({"host": socket.gethostname()})
    return arrived


def _listener(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ClusterError(
            f"Process 0 cannot listen at port {port} ({error.strerror}); is another run using it?"
        ) from None


def _admit(connection: _Connection, processes: int, arrived: dict[int, _Connection]) -> None:
    """Add a process that announces itself; strangers are ignored."""
    connection.socket.settimeout(5.0)
    hello = connection.receive()
    process, count = hello.get("process"), hello.get("processes")
    connection.host = str(hello.get("host"))
    if not isinstance(process, int) or not isinstance(count, int):
        connection.close()
        return
    other = arrived.get(process)
    fault = None
    if count != processes or not 0 < process < processes:
        fault = (
            f"Process {process} of {count} on {connection.host} does not belong to a run of"
            f" {processes} processes. Start all with the same number."
        )
    elif other is not None and other.is_open():
        fault = (
            f"{other.host} and {connection.host} are both process {process} of {processes}."
            " Each process needs an index of its own, also across slices."
        )
    if fault:
        connection.reject(fault)
        raise ClusterError(fault)
    if other is not None:
        other.close()
    arrived[process] = connection


def _missing(
    processes: int, arrived: dict[int, _Connection], timeout: float, hosts: Sequence[str]
) -> str:
    missing = sorted(set(range(1, processes)) - arrived.keys())
    name = lambda i: f"{i} ({hosts[i]})" if hosts else str(i)
    here = [f"0 ({socket.gethostname()})", *(f"{i} ({arrived[i].host})" for i in sorted(arrived))]
    return (
        f"After {timeout:.0f} s {len(missing)} of {processes} processes are missing:"
        f" {_listed([name(i) for i in missing])}. Those that have come: {_listed(here)}. See what"
        " the missing ones print, and whether they reach process 0."
    )


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
