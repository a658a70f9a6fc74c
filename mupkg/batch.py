"""Running one notebook of a batch: the target is there only if the notebook ran to its end.

    python -m mupkg.batch NOTEBOOK TARGET '{"parameter": value}' [--threads N] [--one-gpu]

Nothing heavy is imported here: the notebook's kernel does that once more anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import papermill
from filelock import FileLock, Timeout
from nbclient.exceptions import DeadKernelError

from mupkg import repository
from mupkg.scans.writing import machine_lock

# glibc returns large blocks to the system after every step and fetches them again; a training that keeps them is
# faster: .089 instead of .114 s a step at the quick size (one thread, x86-64). Elsewhere these mean nothing.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
# A thread that waits for another sleeps: spinning, two threads beside other work took 25 to 30 times as long for the
# same bits (60 steps of a small 3D network, two virtual CPUs at load 10).
WAIT_ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def one_gpu() -> FileLock | None:
    """One GPU of several that CUDA_VISIBLE_DEVICES lists, for this notebook: the first that no other one has.

    Taken by the lock on a file that is given back, which ends with this process however it ends. If all are taken,
    the first is shared. With one GPU or an unset variable nothing is chosen.
    """
    devices = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    for device in devices if len(devices) > 1 else ():
        lock = machine_lock(f"GPU {device}")
        with suppress(Timeout):
            lock.acquire()
            os.environ["CUDA_VISIBLE_DEVICES"] = device  # the kernel inherits it
            return lock
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[0]
    return None


def run_notebook(
    notebook: str | Path, target: str | Path, parameters: Mapping[str, Any], *, threads: int = 1
) -> None:
    """Execute a notebook with papermill from the repository's root, and put the executed one at `target`.

    While it runs it is called `<target>.running.ipynb`; if it fails it is kept for reading as
    `<target>.failed.ipynb` and there is no target.

    Args:
        threads: of PyTorch and SimpleITK in the notebook's kernel.

    Raises:
        RuntimeError: naming the notebook, the failed cell's error, and where the failed notebook lies.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    running, failed = (target.with_suffix(f".{state}.ipynb") for state in ("running", "failed"))
    os.environ |= dict.fromkeys(THREAD_VARIABLES, str(threads))  # the kernel inherits them
    os.environ |= {name: os.environ.get(name, value) for name, value in (KEEP_MEMORY | WAIT_ASLEEP).items()}
    target.unlink(missing_ok=True)  # else a failure would leave what ran before, to be taken for this run's
    execute = partial(
        papermill.execute_notebook,
        str(notebook),
        str(running),
        dict(parameters),
        progress_bar=False,
        cwd=repository(),
        kernel_name="python3",
        store_widget_state=False,  # megabytes that nothing shows: pictures stand for widgets
        shutdown_kernel="immediate",  # all files are written: no kernel need take PyTorch apart first
        extra_arguments=["--log-level=40"],  # errors only: a kernel warns of unencrypted loopback otherwise
    )
    try:
        try:
            execute()
        except RuntimeError as error:
            # Two kernels that start at once may choose one port; the one that loses it never answers.
            if isinstance(error, DeadKernelError):
                raise
            execute()
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        reason = "its kernel died, killed or out of memory; free some, or choose a smaller batch_size or size"
    except RuntimeError as error:
        reason = f"its kernel was started twice and never answered ({error}); run it again when less is at work"
    else:
        os.replace(running, target)
        failed.unlink(missing_ok=True)
        return
    os.replace(running, failed)
    raise RuntimeError(f"{notebook} failed: {reason}\nIt is kept for reading: {failed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=run_notebook.__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("parameters", type=json.loads, help="a JSON object")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--one-gpu", action="store_true", help="of those CUDA_VISIBLE_DEVICES lists, a free one alone"
    )
    arguments = parser.parse_args()
    try:
        held = one_gpu() if arguments.one_gpu else None  # noqa: F841, until this process ends
        run_notebook(arguments.notebook, arguments.target, arguments.parameters, threads=arguments.threads)
    except RuntimeError as error:
        sys.exit(str(error))
    except (OSError, ValueError) as error:
        sys.exit(
            f"{arguments.notebook}: cannot be run ({error}); check the names of notebook and target, "
            "and that there is room to write"
        )


if __name__ == "__main__":
    main()
