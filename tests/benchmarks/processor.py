"""How much of what this processor can multiply a training step and a prediction get."""

from __future__ import annotations

import numpy as np
import torch
from measuring import interleaved, row
from metric_loss import BATCH, labelled_patches, operations, training_step

from mupkg.configurations import build, configuration
from mupkg.stages.prediction import predict_volume

EDGE = 2048  # of the matrices


def processor(repeats: int, quick: bool = False) -> list[dict]:
    """Full width against a matrix product of as many operations; aim .6 of its speed in a float32 training step."""
    edge, batch = (256, 1) if quick else (EDGE, BATCH["cpu"])
    images, labels = labelled_patches(batch, 64)
    network = build(configuration("MetricUNet-HCP"))[0].to(memory_format=torch.channels_last)
    volume = np.random.default_rng(0).integers(0, 256, (batch, 128, 128), dtype=np.uint8)
    matrices = {bf16: torch.rand(edge, edge).to(torch.bfloat16 if bf16 else torch.float32) for bf16 in (False, True)}
    rows = []
    for bf16, precision in ((False, "no"), (True, "bf16")):
        work = {
            f"step of MetricUNet-HCP, batch {batch}": training_step(
                "MetricUNet-HCP", images.to(memory_format=torch.channels_last), labels, bf16=bf16
            ),
            f"prediction of {batch} slices of 128 x 128": lambda p=precision: predict_volume(
                network, volume, precision=p
            ),
        }
        matrix = matrices[bf16]
        times = interleaved(work | {"product": lambda m=matrix: m @ m}, repeats)
        product = operations(lambda m=matrix: m @ m)
        for what, call in work.items():
            done = operations(call)
            as_many = [took * done / product for took in times["product"]]
            found = row(
                f"{what}, full width, {'bf16' if bf16 else 'float32'}", times[what], as_many, "matrix product"
            )
            note = f"{1 / found['ratio']:.2f} of the {1e-9 * done / np.median(as_many):.0f} GFLOP/s of a product"
            rows.append(found | {"note": f"{note} of {edge} x {edge}; {1e-9 * done:.0f} GFLOP"})
    return rows
