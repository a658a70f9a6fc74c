"""The metric branch: what it adds to a step, and against a library that takes every triplet of the voxels it gets."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from measuring import compare, interleaved, isolated, memory_mb, row, seconds

from mupkg.configurations import TABLE_II, build, configuration
from mupkg.losses import SegmentationMetricLoss, VoxelMetricLoss
from mupkg.models import SegmentationOutput
from mupkg.samplers import RandomSampler

CAP_GB, LIMIT_S = 8, 60.0
BATCH = {"cpu": 4, "cuda": 120}  # 120 are the paper's 4 x 30
PEERS = {
    "all triplets": "pytorch-metric-learning, TripletMarginLoss",
    "mined": "pytorch-metric-learning, BatchHardMiner + TripletMarginLoss",
}


def labelled_patches(batch: int, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and a disc of prostate in each."""
    y, x = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    disc = ((y - edge / 2) ** 2 + (x - edge / 2) ** 2 < (edge / 4) ** 2).long()
    return torch.rand(batch, 3, edge, edge), disc.expand(batch, edge, edge).contiguous()


def training_step(
    name: str, images: torch.Tensor, labels: torch.Tensor, *, compiled: bool = False, bf16: bool = False
) -> Callable[[], None]:
    """A bare step of a full-width configuration on one batch, on the images' device and in their memory format."""
    network, loss = build(configuration(name))
    last = images.is_contiguous(memory_format=torch.channels_last)
    network = network.to(images.device, memory_format=torch.channels_last if last else torch.contiguous_format)
    run = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator(images.device).manual_seed(0)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            output = run(images)
        loss(output, labels, generator).total.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def metric_branch(repeats: int, quick: bool = False, device: str = "cpu") -> list[dict]:
    """A full-width training step of HCP in either layout, and of HC, against the plain UNet; aim 2 % more."""
    batch, bf16 = BATCH[device] if not quick else 1, device == "cuda"
    images, labels = (tensor.to(device) for tensor in labelled_patches(batch, 64))
    layouts = {"channels_last": images.to(memory_format=torch.channels_last), "contiguous": images}
    rows = []
    for layout, images in layouts.items():
        plain = training_step("UNet", images, labels, bf16=bf16)
        for name in ("MetricUNet-HC", "MetricUNet-HCP") if layout == "channels_last" else ("MetricUNet-HCP",):
            what = f"step of {name}, batch {batch}, full width, {layout}{', bf16' if bf16 else ''}"
            step = training_step(name, images, labels, bf16=bf16)
            rows.append(compare(what, step, plain, repeats, "UNet's step"))
    return rows


def cost(repeats: int, quick: bool = False, device: str = "cpu") -> list[dict]:
    """A full-width step of every configuration, in turns with UNet's; the paper says under 10 % more."""
    batch, bf16 = BATCH[device] if not quick else 1, device == "cuda"
    images, labels = (tensor.to(device) for tensor in labelled_patches(batch, 64))
    images = images.to(memory_format=torch.channels_last)
    names = [*TABLE_II, *(f"MetricUNet-{letters}" for letters in ("HCR", "RN", "HN", "CN", "HCNP"))]
    names = names if not quick else ["UNet", "UNet++", "MetricUNet++-H"]
    times = interleaved({name: training_step(name, images, labels, bf16=bf16) for name in names}, repeats)
    pairs = [(name, "UNet") for name in names[1:]] + [("MetricUNet++-H", "UNet++")]
    more = f", batch {batch}, full width, channels_last{', bf16' if bf16 else ''}"
    return [row(f"step of {name}{more}", times[name], times[plain], f"{plain}'s step") for name, plain in pairs]


def loss_of_one_patch(who: str, edge: int, threads: int) -> dict[str, float]:
    """Forward and backward of a metric loss whose batch is every voxel of one patch: median ms, and MB before it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, labels = labelled_patches(1, edge)
    embeddings = torch.rand(1, 256, edge, edge, requires_grad=True)
    if who == "ours":
        loss = SegmentationMetricLoss([RandomSampler()], VoxelMetricLoss())
        output = SegmentationOutput(torch.zeros(1, 2, edge, edge), embeddings)

        def call() -> None:
            loss(output, labels).total.backward()

    else:
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.miners import BatchHardMiner

        peer, miner = TripletMarginLoss(margin=0.7), BatchHardMiner() if who == "mined" else None

        def call() -> None:
            voxels = embeddings.flatten(2)[0].T
            peer(voxels, labels.flatten(), miner(voxels, labels.flatten()) if miner else None).backward()

    idle, first = memory_mb("VmRSS"), seconds(call)
    times = [first] if first > 2 else [seconds(call) for _ in range(5)]
    return {"ms": 1e3 * statistics.median(times), "idle_mb": idle}


def against_all_pairs(repeats: int, quick: bool = False) -> list[dict]:
    """The metric loss against pytorch-metric-learning's as the patch grows, each in a process of its own."""
    rows = []
    for edge in (8, 16) if quick else (16, 32, 64, 128):
        ours = isolated(loss_of_one_patch, "ours", edge, torch.get_num_threads())
        for who, name in PEERS.items():
            theirs = isolated(loss_of_one_patch, who, edge, torch.get_num_threads(), cap_gb=CAP_GB, limit_s=LIMIT_S)
            rows.append(
                {
                    "what": f"metric loss on every voxel of one {edge} x {edge} patch",
                    "peer": name,
                    "ours_ms": ours["ms"],
                    "peer_ms": theirs.get("ms"),
                    "ratio": ours["ms"] / theirs["ms"] if "ms" in theirs else None,
                    "ours_mb": ours["peak_mb"] - ours["idle_mb"],
                    "peer_mb": theirs["peak_mb"] - theirs["idle_mb"] if "peak_mb" in theirs else None,
                    "note": theirs.get("note", ""),
                }
            )
    return rows


def step(repeats: int, quick: bool = False, device: str = "cpu") -> list[dict]:
    """A full-width HCP step in other memory formats and precisions, and compiled, against plain float32."""
    batch = BATCH[device] if not quick else 1
    plain, labels = (tensor.to(device) for tensor in labelled_patches(batch, 64))
    last = plain.to(memory_format=torch.channels_last)
    options = {
        "float32, contiguous": (plain, {}),
        "float32, channels_last": (last, {}),
        "bf16, channels_last": (last, {"bf16": True}),
        "bf16, channels_last, compiled": (last, {"bf16": True, "compiled": True}),
        "float32, channels_last, compiled": (last, {"compiled": True}),
    }
    if quick:
        options = dict(list(options.items())[:3])
    calls = {name: training_step("MetricUNet-HCP", images, labels, **how) for name, (images, how) in options.items()}
    times = interleaved(calls, repeats)
    first = next(iter(options))
    rows = [row(f"step, batch {batch}, {name}", times[name], times[first], first) for name in list(options)[1:]]
    if device == "cuda":
        work, rate = operations(calls[first]), matmul_rate(device)
        for found in rows:
            reached = work / (found["ours_ms"] / 1e3)
            found["note"] = (
                f"{reached / 1e12:.1f} TFLOP/s, {reached / rate:.0%} of the card's bf16 product of matrices"
            )
    return rows


def operations(call: Callable[[], object]) -> int:
    """Floating point operations of a call, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matmul_rate(device: str, size: int = 8192) -> float:
    """Operations per second of a product of two bf16 matrices: what the device can give at best."""
    a, b = (torch.rand(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize()

    product()
    return 2 * size**3 / min(seconds(product) for _ in range(10))
