"""Running one notebook of a batch: the target is there only if the notebook ran to its end.

    python -m mupkg.report.batch NOTEBOOK TARGET '{"parameter": value}' [--threads N]

Nothing heavy is imported here: the notebook's kernel does that once more anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import papermill

from mupkg import repository

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


@contextmanager
def one_gpu() -> Iterator[None]:
    """One GPU of several that CUDA_VISIBLE_DEVICES lists, for this notebook: the first that no other one has.

    Taken by a lock on a file, which ends with this process however it ends. Are all taken, the first is shared.
    With one GPU or an unset variable nothing is chosen.
    """
    devices = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if len(devices) < 2:
        yield
        return
    import fcntl  # not on Windows

    with ExitStack() as files:
        chosen = devices[0]
        for device in devices:
            name = f"mupkg-gpu-{os.getuid()}-{device.replace('/', '-')}.lock"
            file = files.enter_context((Path(tempfile.gettempdir()) / name).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            chosen = device
            break
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen  # the kernel inherits it
        try:
            yield
        finally:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)


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
    try:
        papermill.execute_notebook(
            str(notebook),
            str(running),
            dict(parameters),
            progress_bar=False,
            cwd=repository(),
            kernel_name="python3",
            store_widget_state=False,  # megabytes that nothing shows: pictures stand for widgets
            extra_arguments=["--log-level=40"],  # errors only: every kernel warns of unencrypted loopback otherwise
        )
    except papermill.PapermillExecutionError as error:
        os.replace(running, failed)
        message = f"{notebook} failed: {error.ename}: {error.evalue}\nIt is kept for reading: {failed}"
        raise RuntimeError(message) from None
    os.replace(running, target)
    failed.unlink(missing_ok=True)


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=run_notebook.__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("parameters", type=json_object, help="a JSON object")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    try:
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
