"""Times ours and the peers in turn, A B A B, each in a process of its own on the same cores."""

import contextlib
import math
import multiprocessing
import os
import platform
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from ntm_jax.analysis.benchmark import aligned
from ntm_jax.analysis.peers import OURS, PEERS
from ntm_jax.analysis.peers.child import serve
from ntm_jax.analysis.peers.work import Peer, Sizes
from ntm_jax.errors import UserError

SECONDS = 1.0  # the shortest timed run
STEP = Sizes(images=32, tokens=64, width=256, head=64, blocks=4, layers=2)
INVERSE = Sizes(images=8, tokens=256, width=256, head=64, blocks=2, layers=2)
ROWS = {  # name: the adapter's function and its arguments
    "train step": ("train_step", STEP),
    "inverse, sequential": ("inverse", INVERSE, "sequential"),
    "inverse, parallel": ("inverse", INVERSE, "parallel"),
}


class Child:
    """The process of a peer, and the pipe to it."""

    def __init__(self, peer: Peer, folder: str):
        context = multiprocessing.get_context("spawn")  # a fork would share started threads
        self.name = peer.name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, peer, folder), daemon=True)
        self.process.start()
        other.close()  # so that reading fails once the child has ended

    def ask(self, method: str, *arguments) -> Any:
        """The child's answer. Raises UserError with its error, or if it has ended."""
        try:
            self.pipe.send((method, *arguments))
            answer, error = self.pipe.recv()
        except (EOFError, OSError):
            error = "its process has ended"
        if error:
            raise UserError(f"{self.name} fails in {method}: {error}; see its output above")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join(10)
        self.process.kill()


@contextlib.contextmanager
def started(peers: Iterable[Peer], folder: str) -> Iterator[list[Child]]:
    """The children of the peers."""
    with contextlib.ExitStack() as stack:
        children = []
        for peer in peers:
            children.append(Child(peer, folder))
            stack.callback(children[-1].close)
        yield children


def machine() -> str:
    """The cores that this process and its children may use."""
    return f"{len(os.sched_getaffinity(0))} cores of {platform.processor() or platform.machine()}"


def missing(folder: str) -> list[str]:
    """A line for each peer that is not there."""
    return [line for peer in PEERS if (line := peer.missing(folder))]


def compare(folder: str, runs: int, only: str = "") -> list[dict]:
    """The rows of ours and of the peers that are in `folder`.

    A row has name, peer, seconds (the median of the runs), flops, flops_per_second, limit (FLOP/s
    of large products in that framework), share_of_limit, times_ours (the median over the rounds of
    its time for a FLOP divided by ours), runs (each run's seconds), error (an inverse's round trip)
    and note. Raises UserError if no peer is there, or no row's name contains `only`.
    """
    chosen = {name: row for name, row in ROWS.items() if only in name}
    if not chosen:
        raise UserError(f"--rows={only} is in no row's name: expected a part of "
                        f"{', '.join(map(repr, ROWS))}")
    peers = [peer for peer in PEERS if not peer.missing(folder)]
    if not peers:
        raise UserError(f"--peers={folder} has no flow to compare with: "
                        + "; ".join(missing(folder)))
    with started([OURS, *peers], folder) as children:
        return [row for name, request in chosen.items()
                for row in _rows(name, request, children, runs)]


def _rows(name: str, request: tuple, children: list[Child], runs: int) -> list[dict]:
    facts = {child: found for child in children if (found := _prepared(child, request))}
    counts = {child: math.ceil(SECONDS / found["seconds"]) for child, found in facts.items()}
    rounds = [{child: child.ask("time", counts[child]) for child in facts} for _ in range(runs)]
    ours = children[0]

    def row(child: Child) -> dict:
        work = facts[child]
        seconds = [taken[child][0] for taken in rounds]
        median = statistics.median(seconds)
        limit = statistics.median(taken[child][1] for taken in rounds)
        ratios = [taken[child][0] / taken[ours][0] for taken in rounds]
        equal = facts[ours]["flops"] / work["flops"]
        rate = work["flops"] / median
        return {"name": name, "peer": child.name, "seconds": median, "flops": work["flops"],
                "flops_per_second": rate, "limit": limit, "share_of_limit": rate / limit,
                "times_ours": equal * statistics.median(ratios), "runs": seconds,
                "error": work["error"], "note": work["note"]}

    return list(map(row, facts))


def _prepared(child: Child, request: tuple) -> dict | None:
    """What child.prepare gives; None for a peer that fails, whose checkout may be another one."""
    try:
        return child.ask("prepare", *request)
    except UserError as error:
        if child.name == OURS.name:
            raise
        print(f"left out: {error}", flush=True)


def table(rows: list[dict]) -> str:
    """The text of the rows, and notes on them."""
    heads = ("", "", "ms", "lowest", "highest", "GFLOP/s", "products", "share", "x ours", "error")
    notes = [f"{row['peer']}, {row['name']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([aligned([heads, *map(_cells, rows)], names=2), *notes])


def _cells(row: dict) -> tuple[str, ...]:
    times = (row["seconds"], min(row["runs"]), max(row["runs"]))
    return (row["name"], row["peer"], *(f"{1e3 * value:,.0f}" for value in times),
            f"{row['flops_per_second'] / 1e9:,.1f}", f"{row['limit'] / 1e9:,.1f}",
            f"{row['share_of_limit']:.1%}", f"{row['times_ours']:.2f}",
            "" if row["error"] is None else f"{row['error']:.1e}")
