"""Times ours and the peers in turn, A B A B, each in a process of its own on the same cores."""

import contextlib
import math
import multiprocessing
import os
import platform
import statistics
from concurrent.futures import ProcessPoolExecutor

from ntm_jax.errors import UserError
from ntm_jax.tools.rates.benchmark import aligned
from tests.peers import OURS, PEERS, child
from tests.peers.work import Sizes

SECONDS = 1.0  # the shortest timed run
STEP = Sizes(images=32, tokens=64, width=256, head=64, blocks=4, layers=2)
INVERSE = Sizes(images=8, tokens=256, width=256, head=64, blocks=2, layers=2)
ROWS = {  # name: the adapter's function and its arguments
    "train step": ("train_step", STEP),
    "inverse, sequential": ("inverse", INVERSE, "sequential"),
    "inverse, parallel": ("inverse", INVERSE, "parallel"),
}


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
    and note. Those whose name contains `only`. Raises UserError if no peer is there.
    """
    peers = [peer for peer in PEERS if not peer.missing(folder)]
    if not peers:
        raise UserError(f"--peers={folder} has no flow to compare with: "
                        + "; ".join(missing(folder)))
    context = multiprocessing.get_context("spawn")  # a fork would share started threads
    with contextlib.ExitStack() as stack:
        pools = {peer.name: stack.enter_context(
            ProcessPoolExecutor(1, context, child.begin, (peer, folder)))
            for peer in (OURS, *peers)}
        return [row for name, request in ROWS.items() if only in name
                for row in _rows(name, request, pools, runs)]


def _rows(name: str, request: tuple, pools: dict[str, ProcessPoolExecutor],
          runs: int) -> list[dict]:
    facts = {peer: found for peer, pool in pools.items()
             if (found := pool.submit(child.prepare, *request).result())}
    counts = {peer: math.ceil(SECONDS / found["seconds"]) for peer, found in facts.items()}
    rounds = [{peer: pools[peer].submit(child.timed, counts[peer]).result() for peer in facts}
              for _ in range(runs)]

    def row(peer: str) -> dict:
        work = facts[peer]
        seconds = [taken[peer][0] for taken in rounds]
        limit = statistics.median(taken[peer][1] for taken in rounds)
        ratios = [taken[peer][0] / taken[OURS.name][0] for taken in rounds]
        equal = facts[OURS.name]["flops"] / work["flops"]
        median = statistics.median(seconds)
        rate = work["flops"] / median
        return {"name": name, "peer": peer, "seconds": median, "flops": work["flops"],
                "flops_per_second": rate, "limit": limit, "share_of_limit": rate / limit,
                "times_ours": equal * statistics.median(ratios), "runs": seconds,
                "error": work["error"], "note": work["note"]}

    return list(map(row, facts))


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
