"""Python that starts warm: forks of one process that has imported what every notebook and every plan imports.

A kernel needs two seconds of a processor to import PyTorch, Matplotlib and the like, Snakemake no less, and the tests
start dozens of both. With the fixture `warm` a kernel called python3 is a fork of a process that imported them once,
and `[*warm, "snakemake", ...]` is a command of the same kind. The suite's own modules are imported by each fork as
ever. It is not for tests of how a kernel starts or ends.

    python tests/warm_python.py NAME MODULE ARGUMENTS    as `python -m MODULE ARGUMENTS`
"""

import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

IMPORTED = ("accelerate", "matplotlib.pyplot", "monai.networks.nets", "pandas", "pydantic", "safetensors.torch")
IMPORTED += ("scipy.stats", "SimpleITK", "sklearn.decomposition", "torch", "ipykernel.kernelapp", "snakemake.cli")
MESSAGE = 1 << 20  # bytes: room for an environment


def stand_for_a_fork(name: str, arguments: list[str]) -> int:
    """Ask for a fork with this process's folder, environment and streams; its exit status, once it has ended.

    It is also over when the parent of this process ends, as kernels end without theirs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # with which a kernel's end begins
    parent, status = os.getppid(), None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(f"\0{name}")
        told = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(told).encode()], [0, 1, 2])
        connection.settimeout(1)
        while status is None and os.getppid() == parent:
            with suppress(TimeoutError):
                status = connection.recv(1)
    return status[0] if status else -signal.SIGKILL


def be_a_fork(connection: socket.socket) -> int:
    """Run a module as a process of its own would, and end when the one that asked ends; the exit status."""
    message, streams, *_ = socket.recv_fds(connection, MESSAGE, 3)
    told = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ |= told["environment"] | {"JPY_PARENT_PID": str(os.getppid())}  # a kernel without its parent ends
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threading.Thread(target=lambda: os._exit(len(connection.recv(1))), daemon=True).start()
    module, *sys.argv[1:] = told["arguments"]
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    return 0


def fork(listening: socket.socket) -> None:
    """Import what takes long; then a fork for each that asks, until standard input ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while all(key.fileobj is listening for key, _ in selector.select()):
            connection, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                status = be_a_fork(connection)
                sys.stdout.flush()
                sys.stderr.flush()
                connection.send(bytes([status]))
                os._exit(status)
            connection.close()
    os._exit(0)  # without taking PyTorch apart


@contextmanager
def warm_python(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """While this lasts: what a command begins with to start warm, and the environment in which kernels do.

    Elsewhere than on Linux all start as ever.
    """
    if sys.platform != "linux":
        yield [sys.executable, "-m"], {}
        return
    name = f"warm python of {os.getpid()}"
    command = [sys.executable, "-I", "-S", __file__, name]
    spec = folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    kernel = {"argv": [*command, "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    spec.write_text(json.dumps(kernel | {"display_name": "Python 3, warm"}), encoding="utf-8")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(f"\0{name}")  # a name, no file: a path may be too long
        listening.listen(16)
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(listening.fileno())],
            stdin=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
            pass_fds=[listening.fileno()],
        )
        yield command, {"JUPYTER_PATH": str(folder)}
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    first, *others = sys.argv[1:]
    if first == "--serve":
        fork(socket.socket(fileno=int(others[0])))
    else:
        sys.exit(stand_for_a_fork(first, others))
