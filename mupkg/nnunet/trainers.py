"""Trainers for nnU-Net's own `-tr`: its own one for a chosen number of epochs, and the same with our branch.

nnU-Net alone imports this module, see `mupkg.nnunet.bridge.install_trainers`.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from mupkg.configurations import build
from mupkg.nnunet.bridge import EPOCHS, ITERATIONS, SEED, MetricBranch, embedding_layer

CUDA = torch.device("cuda")


class nnUNetTrainerChosen(nnUNetTrainer):
    """nnU-Net's own trainer; epochs, iterations an epoch and the seed come from the environment, where set there."""

    # nnU-Net stores these arguments by their names, and gives `device` unless it trains on several GPUs.
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ.get(EPOCHS, self.num_epochs))
        self.num_iterations_per_epoch = int(os.environ.get(ITERATIONS, self.num_iterations_per_epoch))
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)  # its own are 250 and 50
        self.save_every = 1  # its own is 50 epochs: a shorter training that broke off would begin again
        self.seed = int(os.environ[SEED]) + self.local_rank if SEED in os.environ else None

    def initialize(self) -> None:
        if "OMP_NUM_THREADS" in os.environ:  # on a CPU, nnUNetv2_train has just taken all cores
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if self.seed is not None:
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(self.seed)
        super().initialize()


class nnUNetTrainerMetricHCP(nnUNetTrainerChosen):
    """The same with the metric losses of MetricUNet-HCP; weights and patches are drawn as without them."""

    metric_configuration = "MetricUNet-HCP"

    def initialize(self) -> None:
        super().initialize()
        _, metric_loss = build(self.metric_configuration)
        self.loss = MetricBranch(self.loss, embedding_layer(self.network), metric_loss, self.seed)
