"""What a training costs beside its steps, and what changes its bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measuring import compare, row, seconds
from metric_loss import BATCH, labelled_patches, training_step

from mupkg.configurations import build, configuration
from mupkg.data.patches import PatchSource
from mupkg.stages.runs import load_tensors
from mupkg.stages.training import LAST, train


def source_of(volumes: int, shape: tuple[int, int, int], batch: int) -> PatchSource:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, shape, dtype=np.uint8) for _ in range(volumes)]
    return PatchSource(images, [(image > 200).astype(np.uint8) for image in images], batch_size=batch)


def synchronized(call: Callable[[], object], device: str) -> Callable[[], None]:
    def and_wait() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return and_wait


def training_loop(repeats: int, quick: bool = False, device: str = "cpu") -> list[dict]:
    """`train` against the bare forward + backward + SGD on batches that are there; bar 3 % more on a CPU."""
    width, steps = ((32, 256) if device == "cuda" else (16, 64)), 5 if quick else 20
    source, bf16 = source_of(4, (32, 128, 128), 30 if device == "cuda" else 8), device == "cuda"

    def parts():
        network, loss = build(configuration("MetricUNet-HCP"), base_filters=width[0], embedding_dim=width[1])
        return network.to(device, memory_format=torch.channels_last).train(), loss

    def bare() -> float:
        network, loss = parts()
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        batches = [source.to(device).batch(step) for step in range(steps)]

        def loop() -> None:
            for images, labels in batches:
                optimizer.zero_grad()
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    output = network(images.to(memory_format=torch.channels_last))
                loss(output, labels).total.backward()
                optimizer.step()

        return seconds(synchronized(loop, device))

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            options = {"steps": steps, "validate_every": steps, "precision": "bf16" if bf16 else "no"}
            history = train(*parts(), source, folder, validate=lambda n: 0.0, metadata={}, **options)
        return float((history["seconds"] * history["step"].diff().fillna(history["step"].iloc[0])).sum())

    times = [(ours(), bare()) for _ in range(repeats + 1)][1:]  # the first warms up
    return [row(f"{steps} training steps, width {width[0]}", *zip(*times, strict=True), "bare loop")]


def loader(repeats: int, quick: bool = False, device: str = "cpu") -> list[dict]:
    """A batch's cutting against a full-width training step on it; aim below 1 % with the cohort in a GPU's memory."""
    batch = BATCH[device] if not quick else 1
    here = source_of(8, (128, 128, 128), batch)
    source, number = here.to(device), iter(range(10**9))
    images, labels = (tensor.to(device) for tensor in labelled_patches(batch, 64))
    step = training_step(
        "MetricUNet-HCP", images.to(memory_format=torch.channels_last), labels, bf16=device == "cuda"
    )
    cut = synchronized(lambda: source.batch(next(number)), device)
    copied = synchronized(lambda: [tensor.to(device) for tensor in here.batch(next(number))], device)
    what = f"a batch of {batch}, cut from a cohort in the device's memory"
    return [
        compare(what, cut, step, repeats, "a training step on it, full width"),
        compare(what, cut, copied, repeats, "cut on the CPU and copied"),
    ]


def repeating(repeats: int, quick: bool = False, device: str = "cpu") -> list[dict]:
    """Which choices leave a training's weights the same to the bit, and how far the others move them."""
    steps = 4 if quick else 40
    source = source_of(4, (8, 64, 64), 8)

    def weights(threads: int = 1, breaks: bool = False, **options) -> dict[str, torch.Tensor]:
        options = {"steps": steps, "validate_every": steps // 2, "metadata": {}} | options

        def validate(network: torch.nn.Module, calls: list) -> float:
            calls.append(0)
            if breaks and len(calls) == 2:
                raise KeyboardInterrupt
            return 0.0

        with tempfile.TemporaryDirectory() as folder:
            for attempt in range(1 + breaks):
                torch.manual_seed(0)
                network, loss = build(configuration("MetricUNet-HCP"), base_filters=8, embedding_dim=32)
                calls: list = [0, 0] if attempt else []
                torch.set_num_threads(threads)
                try:
                    train(network, loss, source, folder, validate=lambda n, c=calls: validate(n, c), **options)
                except KeyboardInterrupt:
                    continue
            return load_tensors(Path(folder) / LAST)[0]

    asked = torch.get_num_threads()
    choices = {
        "the same once more": {},
        "broken off and resumed": {"breaks": True},
        "one worker cuts batches": {"workers": 1},
        "two workers": {"workers": 2},
        "two threads": {"threads": 2},
        "contiguous memory format": {"channels_last": False},
    }
    rows, plain = [], weights()
    for what, options in choices.items():
        found = weights(**options)
        moved = max((found[name].float() - plain[name].float()).abs().max().item() for name in plain)
        note = f"largest difference of a weight {moved:.1e}" if moved else "the same bits"
        rows.append({"what": f"{steps} training steps: {what}", "peer": "undisturbed, one thread", "note": note})
    torch.set_num_threads(asked)
    return rows
