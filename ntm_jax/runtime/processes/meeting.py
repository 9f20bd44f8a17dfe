"""Checks that all processes of a job have come and belong together, before jax connects them.

Process 0 listens on the coordinator's port. Every process, process 0 included, connects to the
coordinator's address, reads a greeting and sends its --num_processes and --process_id. Process 0
answers all at once: an empty refusal when all have come, else the reason. It then closes the port,
on which jax's own service starts. jax alone would wait for a wrongly started process until the time
is up, or abort.
"""

import contextlib
import errno
import json
import os
import random
import re
import selectors
import socket
import threading
import time
from collections.abc import Iterator

from ntm_jax.errors import UserError

GREETING = b"ntm_jax\n"
SILENCE = 5.0  # seconds without a greeting after which a connection is another program's
LINGER = 5.0  # seconds for which process 0 repeats a refusal to those that come late
PAUSE = 0.05  # seconds between attempts to connect
ATTEMPTS = 3  # to open the port: of two that open one at the same moment, Linux refuses both
_ADDRESS = re.compile(r"(?P<host>[^\s:\[\]]+|\[[0-9a-fA-F:.%\w]+\]):(?P<port>[0-9]{1,5})")


def split(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPv6]:PORT; UserError where it is neither."""
    match = _ADDRESS.fullmatch(address)
    if not match or not 1 <= int(match["port"]) <= 65535:
        raise UserError(f"--coordinator_address={address}: expected HOST:PORT of process 0, with a "
                        "port from 1 to 65535")
    return match["host"].strip("[]"), int(match["port"])


def meet(address: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns in every process when all `num_processes` have come to `address`.

    UserError, with the reason, within 10 s of the last process's start if they were started
    differently, if two have one number, or if another program holds the port; after `timeout`
    seconds if one does not come.
    """
    host, port = split(address)
    deadline = time.monotonic() + timeout
    me = {"num_processes": num_processes, "process_id": process_id}
    server = _serve(address, num_processes, timeout) if process_id == 0 else None
    ask = _ask_who_holds_the_port if process_id == 0 and server is None else _ask
    try:
        refusal = ask(host, port, me, deadline)
    finally:
        if server:
            server.close()
    if refusal is None:
        refusal = (f"process {process_id} waited {timeout:g} s at {address} for {num_processes} "
                   "processes: start them all, with the address of process 0, or give more "
                   "--join_timeout")
    if refusal:
        raise UserError(refusal)
    if process_id:
        _wait_for_port(host, port, deadline)


def _serve(address: str, num_processes: int, timeout: float) -> "_Server | None":
    """Process 0's server, started; None where the port is taken."""
    _, port = split(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address))
    for _ in range(ATTEMPTS):
        try:
            listener = _listen(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"--coordinator_address={address}: port {port} cannot be opened "
                                f"({error.strerror})") from None
            time.sleep(random.uniform(0, 0.2))
            continue
        server = _Server(listener, address, num_processes, timeout)
        server.start()
        return server
    return None


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()  # IPv4 and IPv6, as jax's own service
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)


class _Server(threading.Thread):
    """Process 0's side of the meeting, a thread."""

    def __init__(self, listener: socket.socket, address: str, num_processes: int, timeout: float):
        super().__init__(daemon=True)
        self._listener, self._address = listener, address
        self._count, self._timeout = num_processes, timeout
        self._present: dict[socket.socket, int] = {}  # those that wait for the answer
        self._closed = False

    def close(self) -> None:
        """Waits for the thread's end: at once, or after LINGER seconds where it refused."""
        self._closed = True
        self.join()

    def run(self) -> None:
        with selectors.DefaultSelector() as self._selector, self._listener:
            self._selector.register(self._listener, selectors.EVENT_READ)
            refusal = self._gather()
            if refusal:
                self._answer_all(refusal)
                self._linger(refusal)
            else:
                self._listener.close()  # before the answer: jax's service opens the port next
                self._answer_all(self._missing())

    def _gather(self) -> str:
        """Serves until all have come or the time is up, "", or until the job is refused, why."""
        deadline = time.monotonic() + self._timeout
        while (len(self._present) < self._count and time.monotonic() < deadline
               and not self._closed):
            for connection, hello in self._hellos():
                refusal = self._judge(connection, hello)
                if refusal:
                    return refusal
        return ""

    def _judge(self, connection: socket.socket, hello: dict) -> str:
        """Counts a process as present; returns why it and the others are no job, or ""."""
        number, count = hello["process_id"], hello["num_processes"]
        self._present[connection] = number
        if count != self._count:
            return (f"the processes of this job differ: --num_processes is {self._count} in "
                    f"process 0 and {count} in process {number}: start all with the same number")
        if list(self._present.values()).count(number) > 1:
            return (f"two processes with --process_id={number} came to {self._address}: give each "
                    f"process of a job its own number, from 0 to {count - 1}, and each job its own "
                    "port")
        return ""

    def _missing(self) -> str:
        """Why the meeting ends without all processes; "" when all have come."""
        missing = sorted(set(range(self._count)) - set(self._present.values()))
        if not missing:
            return ""
        if self._closed:
            return "process 0 of this job ended before all had come (see its line)"
        names = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
        return (f"process 0 waited {self._timeout:g} s at {self._address} for {self._count} "
                f"processes, and these did not come: {names}: start them all, with the address of "
                "process 0, or give more --join_timeout")

    def _linger(self, refusal: str) -> None:
        end = time.monotonic() + LINGER
        while time.monotonic() < end:
            for connection, _ in self._hellos():
                self._answer(connection, refusal)

    def _hellos(self) -> Iterator[tuple[socket.socket, dict]]:
        """Serves for 0.1 s: greets who connects, forgets who leaves, yields their messages."""
        for key, _ in self._selector.select(0.1):
            if key.fileobj is self._listener:
                with contextlib.suppress(OSError):
                    self._greet()
            elif hello := _read(key.fileobj, {"num_processes": int, "process_id": int}):
                yield key.fileobj, hello
            else:
                self._forget(key.fileobj)

    def _greet(self):
        connection, _ = self._listener.accept()
        connection.settimeout(1)
        self._selector.register(connection, selectors.EVENT_READ)
        try:
            connection.sendall(GREETING)
        except OSError:
            self._forget(connection)

    def _forget(self, connection):
        self._present.pop(connection, None)
        self._selector.unregister(connection)
        connection.close()

    def _answer_all(self, refusal: str):
        for connection in tuple(self._present):
            self._answer(connection, refusal)

    def _answer(self, connection, refusal: str):
        with contextlib.suppress(OSError):
            _send(connection, {"refusal": refusal})
        self._forget(connection)


def _send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, types: dict[str, type]) -> dict | None:
    """A message with these keys and types; None where the other end left or sends anything else."""
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(4096))
    except (OSError, ValueError):
        return None
    fits = isinstance(message, dict) and types == {key: type(v) for key, v in message.items()}
    return message if fits else None


def _ask(host: str, port: int, me: dict, deadline: float) -> str | None:
    """Process 0's answer: "" when all have come, or why not; None when the deadline passes.

    A connection that is refused or breaks off is tried again: process 0 may come late, or have
    been started again.
    """
    while (left := deadline - time.monotonic()) > 0:
        with (contextlib.suppress(OSError),
              socket.create_connection((host, port), left) as connection):
            # Linux may join a local connection to itself.
            alone = connection.getsockname() == connection.getpeername()
            if not alone and _greeted(connection, host, port):
                _send(connection, me)
                # Process 0's own reason at the deadline comes first.
                connection.settimeout(max(deadline - time.monotonic(), 0) + 1)
                if answer := _read(connection, {"refusal": str}):
                    return answer["refusal"]
        time.sleep(PAUSE)
    return None


def _greeted(connection: socket.socket, host: str, port: int) -> bool:
    """Whether process 0 answers; False where the connection breaks off.

    UserError where another program answers, or nobody for SILENCE seconds.
    """
    connection.settimeout(SILENCE)
    received = b""
    try:
        while len(received) < len(GREETING) and (part := connection.recv(len(GREETING))):
            received += part
    except TimeoutError:
        received = b"silence"
    if received and received != GREETING:
        raise UserError(f"--coordinator_address={host}:{port} is not answered by process 0 of this "
                        "job but by another program, or by a job that has begun: choose a free "
                        "port")
    return received == GREETING


def _ask_who_holds_the_port(host: str, port: int, me: dict, deadline: float) -> str:
    """The refusal of another process 0 that holds the port, or that another program does."""
    with contextlib.suppress(UserError):
        refusal = _ask(host, port, me, min(deadline, time.monotonic() + SILENCE))
        if refusal:
            return refusal
    return (f"--coordinator_address={host}:{port}: port {port} of this machine is taken by another "
            "program or another job: choose a free port")


def _wait_for_port(host: str, port: int, deadline: float) -> None:
    """Waits until jax's service listens: its client would wait a second before a second attempt."""
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.01)
