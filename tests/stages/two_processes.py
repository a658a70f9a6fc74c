"""Trainings by two CPU processes, for test_distributed.py to look at:

python two_processes.py FOLDER [--endless]                      launches them itself
accelerate launch ... two_processes.py FOLDER --launched STEPS  is one of them
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, debug_launcher

from mupkg.configurations import build, configuration
from mupkg.data.patches import PatchSource
from mupkg.stages import training
from mupkg.stages.prediction import predict_volume
from mupkg.stages.runs import save_tensors

RNG = np.random.default_rng(0)
LABEL = np.zeros((6, 24, 24), np.uint8)
LABEL[1:5, 6:18, 8:20] = 1
IMAGE = np.clip(100 + 60 * LABEL + RNG.normal(0, 25, LABEL.shape), 0, 255).astype(np.uint8)
SEED = 5


def parts(name="MetricUNet-HCP"):
    torch.manual_seed(SEED)
    network, loss = build(configuration(name), base_filters=2, embedding_dim=4, anchors=5, pairs=2)
    return network, loss, PatchSource([IMAGE], [LABEL], patch_size=(16, 16), batch_size=3, seed=SEED)


class Recorder:
    """A sampler that keeps what it draws."""

    def __init__(self, sampler):
        self.sampler, self.letter, self.drawn = sampler, sampler.letter, []

    def draw(self, *arguments):
        tuples, valid = self.sampler.draw(*arguments)
        self.drawn.append(torch.stack([*tuples, valid]))
        return tuples, valid


def train(folder, *, steps=1, only_batch=None, break_at=None, name="MetricUNet-HCP", **options):
    """One training; this process's weights, gradients and draws go to folder/rank<r>.safetensors."""
    rank = torch.distributed.get_rank()
    network, loss, source = parts(name)
    loss.samplers = tuple(Recorder(sampler) for sampler in loss.samplers)
    batch, asked = source.batch, []

    def asked_batch(number):
        if number // 2 == break_at:
            raise KeyboardInterrupt
        asked.append(number)
        return batch(number if only_batch is None else only_batch)

    source.batch = asked_batch
    options = {"validate_every": 2, "learning_rate": 0.1, "seed": SEED, "metadata": {"name": name}} | options
    validate = lambda net: float(predict_volume(net, IMAGE).mean())  # noqa: E731
    try:
        history = training.train(network, loss, source, folder, steps=steps, validate=validate, **options)
    except KeyboardInterrupt:
        return
    kept = {f"weight.{n}": p for n, p in network.named_parameters()}
    kept |= {f"gradient.{n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    kept |= {f"draws.{s.letter}": torch.stack(s.drawn) for s in loss.samplers}
    save_tensors(kept, folder / f"rank{rank}.safetensors", {"asked": asked, "rows": len(history)})


def only_the_main_process_writes():
    if torch.distributed.get_rank():

        def forbidden(*arguments, **_options):
            raise AssertionError(f"process 1 writes {arguments}")

        training.save_tensors = training.save_table = forbidden


def main(folder, endless):
    torch.set_num_threads(1)
    only_the_main_process_writes()
    if endless:
        train(folder, steps=10**6)
        return
    train(folder / "step", momentum=0.0, weight_decay=0.0)
    train(folder / "whole", steps=6)
    train(folder / "broken", steps=6, break_at=3)  # in the midst of steps 3 and 4
    train(folder / "broken", steps=6)
    train(folder / "same_batch", steps=3, only_batch=0)
    for name in ("UNet", "MetricUNet++-H", "MetricUNet-R-Sep"):  # no parameter is without a gradient
        train(folder / name, steps=2, name=name)


def launched(folder, steps):
    """What each process of notebook_launcher or of `accelerate launch` does."""
    torch.set_num_threads(1)
    Accelerator()  # brings the processes together
    only_the_main_process_writes()
    train(folder, steps=steps)


if __name__ == "__main__":
    if "--launched" in sys.argv:
        launched(Path(sys.argv[1]), int(sys.argv[3]))
    else:
        debug_launcher(main, (Path(sys.argv[1]), "--endless" in sys.argv), num_processes=2)
