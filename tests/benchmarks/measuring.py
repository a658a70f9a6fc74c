"""How things are measured: interleaved timings, fresh processes with a peak of memory, and exponents of growth."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import resource
except ImportError:  # not on Windows
    resource = None

Call = Callable[[], object]


def seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call after a warm-up, in turns, because a machine's speed drifts."""
    for call in calls.values():
        call()
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: [one[name] for one in rounds] for name in calls}


def row(what: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, **more: Any) -> dict[str, Any]:
    """A row of the table from paired seconds: the median of the pairs' ratios and its quartiles."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "what": what,
        "peer": peer_name,
        "ours_ms": 1e3 * statistics.median(ours),
        "peer_ms": 1e3 * statistics.median(peer),
        "ratio": statistics.median(ratios),
        "quartiles": f"{low:.3f} to {high:.3f}",
        "repeats": len(ratios),
        **more,
    }


def compare(what: str, ours: Call, peer: Call, repeats: int, peer_name: str) -> dict[str, Any]:
    times = interleaved({"ours": ours, "peer": peer}, repeats)
    return row(what, times["ours"], times["peer"], peer_name)


def memory_mb(name: str) -> float:
    """This process's memory in MB: "VmHWM" its peak, "VmRSS" now, "RssAnon" now without the pages of mapped files.

    Not ru_maxrss where it can be helped: Linux hands a child its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(name))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else float("nan")
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def isolated(
    call: Callable[..., dict], *arguments: Any, cap_gb: int | None = None, limit_s: float | None = None
) -> dict:
    """The dict that `call` returns, from a fresh process, with that process's `peak_mb`.

    Where the process runs into `cap_gb` (address space) or `limit_s`, there is `note` alone, which says so.

    Raises:
        RuntimeError: if the call fails in any other way.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, cap_gb, call, arguments))
    process.start()
    sender.close()
    patience_s = 0.0
    try:
        if not receiver.poll(limit_s):
            return {"note": f"over {limit_s:.0f} s"}
        answer = receiver.recv()
        patience_s = 10.0  # to tidy up behind it
    except EOFError:  # killed from outside
        process.join()
        return {"note": f"ended with exit code {process.exitcode}"}
    finally:
        process.join(patience_s)
        process.kill()
        process.join()
    if "error" in answer:
        raise RuntimeError(f"{call.__name__}{arguments}: {answer['error']}")
    return answer


def _child(sender: Any, cap_gb: int | None, call: Callable[..., dict], arguments: Sequence[Any]) -> None:
    if cap_gb and resource:
        resource.setrlimit(resource.RLIMIT_AS, (cap_gb * 2**30,) * 2)
    try:
        answer = call(*arguments)
        answer["peak_mb"] = memory_mb("VmHWM")
    except (MemoryError, RuntimeError) as error:
        no_memory = isinstance(error, MemoryError) or "alloc" in str(error)
        answer = {"note": f"out of memory (cap {cap_gb} GB)"} if no_memory else {"error": repr(error)}
    sender.send(answer)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The b of cost = a * size ** b, by least squares on logarithms; all numbers positive, two sizes at least."""
    if len(sizes) < 2 or min(sizes) <= 0 or min(costs) <= 0:
        raise ValueError(f"an exponent needs two positive sizes and costs at least, not {sizes} and {costs}")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
