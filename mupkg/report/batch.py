"""Running one notebook of a batch: the target is there only if the notebook ran to its end.

    python -m mupkg.report.batch NOTEBOOK TARGET '{"parameter": value}' [--threads N]

Nothing heavy is imported here: the notebook's kernel does that once more anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import papermill

from mupkg import repository

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


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
            extra_arguments=["--log-level=40"],  # errors only: every kernel warns of unencrypted loopback otherwise
        )
    except papermill.PapermillExecutionError as error:
        os.replace(running, failed)
        message = f"{notebook} failed: {error.ename}: {error.evalue}\nIt is kept for reading: {failed}"
        raise RuntimeError(message) from None
    os.replace(running, target)
    failed.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=run_notebook.__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("parameters", type=json.loads, help="a JSON object")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    try:
        run_notebook(arguments.notebook, arguments.target, arguments.parameters, threads=arguments.threads)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
