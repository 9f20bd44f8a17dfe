"""The rendezvous of a job's processes: checks that all are present before jax connects them.

Process 0 listens on the coordinator's port. Every process, including process 0, connects to the
coordinator's address, reads a greeting and sends its --num_processes and --process_id. Process 0
answers all at once: an empty refusal when all are present, else the reason. It then closes the
port, on which jax's own service starts. jax alone would let a wrongly started process wait until
the timeout, or abort it.
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
from typing import cast

from ntm_jax.errors import UserError

GREETING = b"ntm_jax\n"
SILENCE = 5.0  # seconds without a greeting that mark a connection as another program's
LINGER = 5.0  # seconds for which process 0 repeats a refusal to late processes
PAUSE = 0.05  # seconds between attempts to connect
ATTEMPTS = 3  # to open the port: when two programs open it together, Linux refuses both
_ADDRESS = re.compile(r"(?P<host>[^\s:\[\]]+|\[[0-9a-fA-F:.%\w]+\]):(?P<port>[0-9]{1,5})")


def split(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [IPv6]:PORT. Raises UserError for any other address."""
    match = _ADDRESS.fullmatch(address)
    if not match or not 1 <= int(match["port"]) <= 65535:
        raise UserError(f"--coordinator_address={address}: expected HOST:PORT of process 0, with a "
                        "port from 1 to 65535")
    return match["host"].strip("[]"), int(match["port"])


def meet(address: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Waits until all `num_processes` are present at `address`.

    Raises UserError in every process, within 10 s of the last one's start, if their num_processes
    differ, if two have the same process_id, or if another program uses the port; and after
    `timeout` seconds if a process is missing.
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
    """Starts process 0's server; None if the port is taken."""
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
    both = socket.has_dualstack_ipv6()  # IPv4 and IPv6, like jax's own service
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)


class _Server(threading.Thread):
    """Process 0's thread that counts the processes and answers them."""

    def __init__(self, listener: socket.socket, address: str, num_processes: int, timeout: float):
        super().__init__(daemon=True)
        self._listener, self._address = listener, address
        self._count, self._timeout = num_processes, timeout
        self._present: dict[socket.socket, int] = {}  # connection -> process_id, waiting
        self._closed = False

    def close(self) -> None:
        """Waits for the thread to end: at once, or after LINGER seconds if it refused."""
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
        """Waits for all processes or the deadline; returns "", or why it refuses the job."""
        deadline = time.monotonic() + self._timeout
        while (len(self._present) < self._count and time.monotonic() < deadline
               and not self._closed):
            for connection, hello in self._hellos():
                refusal = self._judge(connection, hello)
                if refusal:
                    return refusal
        return ""

    def _judge(self, connection: socket.socket, hello: dict) -> str:
        """Adds a process to those present; returns why it does not belong to the job, or ""."""
        number, count = hello["process_id"], hello["num_processes"]
        self._present[connection] = number
        if count != self._count:
            return (f"the processes of this job differ: --num_processes is {self._count} in "
                    f"process 0 and {count} in process {number}: start all with the same number")
        if list(self._present.values()).count(number) > 1:
            return (f"two processes with --process_id={number} connected to {self._address}: give "
                    f"each process of a job its own number, from 0 to {count - 1}, and each job "
                    "its own port")
        return ""

    def _missing(self) -> str:
        """Names the missing processes; "" if all are present."""
        missing = sorted(set(range(self._count)) - set(self._present.values()))
        if not missing:
            return ""
        if self._closed:
            return "process 0 of this job ended before all were connected (see its error)"
        names = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
        return (f"process 0 waited {self._timeout:g} s at {self._address} for {self._count} "
                f"processes, and these did not connect: {names}: start them all, with the address "
                "of process 0, or give more --join_timeout")

    def _linger(self, refusal: str) -> None:
        end = time.monotonic() + LINGER
        while time.monotonic() < end:
            for connection, _ in self._hellos():
                self._answer(connection, refusal)

    def _hellos(self) -> Iterator[tuple[socket.socket, dict]]:
        """Serves for 0.1 s: greets new connections, drops closed ones, yields messages."""
        for key, _ in self._selector.select(0.1):
            connection = cast(socket.socket, key.fileobj)
            if connection is self._listener:
                with contextlib.suppress(OSError):
                    self._greet()
            elif hello := _read(connection, {"num_processes": int, "process_id": int}):
                yield connection, hello
            else:
                self._drop(connection)

    def _greet(self):
        connection, _ = self._listener.accept()
        connection.settimeout(1)
        self._selector.register(connection, selectors.EVENT_READ)
        try:
            connection.sendall(GREETING)
        except OSError:
            self._drop(connection)

    def _drop(self, connection):
        self._present.pop(connection, None)
        self._selector.unregister(connection)
        connection.close()

    def _answer_all(self, refusal: str):
        for connection in tuple(self._present):
            self._answer(connection, refusal)

    def _answer(self, connection, refusal: str):
        with contextlib.suppress(OSError):
            _send(connection, {"refusal": refusal})
        self._drop(connection)


def _send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, types: dict[str, type]) -> dict | None:
    """A message with these keys and types; None if the other end closed or sent anything else."""
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(4096))
    except (OSError, ValueError):
        return None
    fits = isinstance(message, dict) and types == {key: type(v) for key, v in message.items()}
    return message if fits else None


def _ask(host: str, port: int, me: dict, deadline: float) -> str | None:
    """Process 0's answer: "" when all are present, or a refusal; None once the deadline passes.

    Retries a connection that is refused or breaks off: process 0 may start late, or have been
    restarted.
    """
    while (left := deadline - time.monotonic()) > 0:
        with (contextlib.suppress(OSError),
              socket.create_connection((host, port), left) as connection):
            # Linux may connect a local socket to itself.
            alone = connection.getsockname() == connection.getpeername()
            if not alone and _greeted(connection, host, port):
                _send(connection, me)
                # Waits longer than process 0 does, whose refusal at the deadline says more.
                connection.settimeout(max(deadline - time.monotonic(), 0) + 1)
                if answer := _read(connection, {"refusal": str}):
                    return answer["refusal"]
        time.sleep(PAUSE)
    return None


def _greeted(connection: socket.socket, host: str, port: int) -> bool:
    """Whether process 0 answers; False if the connection breaks off.

    Raises UserError if another program answers, or nobody for SILENCE seconds.
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
    """The refusal of another process 0 that uses the port, or one that names another program."""
    with contextlib.suppress(UserError):
        refusal = _ask(host, port, me, min(deadline, time.monotonic() + SILENCE))
        if refusal:
            return refusal
    return (f"--coordinator_address={host}:{port}: port {port} of this machine is taken by another "
            "program or another job: choose a free port")


def _wait_for_port(host: str, port: int, deadline: float) -> None:
    """Waits until jax's service listens: jax's client waits a second before each new attempt."""
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.01)
