"""Seconds and memory of the released brain model's decoder: one latent of 3 x 20 x 28 x 20 to 160 x 224 x 160 voxels.

    python benchmarks/brain_160_decode.py                               # random weights: the time is the same
    python benchmarks/brain_160_decode.py --model model.safetensors     # of ldm import-weights
    python benchmarks/brain_160_decode.py --latent 4 4 4                # a quick try

Each precision runs in a process of its own, so that its peak is its own. On the CPU the peak is that of the process
(resident set), on a GPU that of torch's allocator. One feature map at full resolution takes 1.5 GB with 64 channels and
2.9 GB with 128, in float32, and several live at once. Prints one JSON line a precision.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from safetensors import safe_open
from torch import nn

from ldm.commands.main import conf_dir
from ldm.commands.run import plain
from ldm.model.build import build_first_stage
from ldm.model.file import load_strict, read_header
from ldm.precision import autocast

PREFIX = "first_stage."


def main() -> None:
    """Measure every precision asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model.safetensors; random weights without one")
    parser.add_argument("--latent", type=int, nargs=3, default=(20, 28, 20), metavar=("D", "H", "W"))
    parser.add_argument("--precision", nargs="+", choices=("bf16", "float32"), default=("bf16", "float32"))
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for precision in arguments.precision:
        process = context.Process(target=measure, args=(arguments, precision))
        process.start()
        process.join()
        if process.exitcode:
            print(json.dumps({"precision": precision, "failed": f"exit code {process.exitcode}"}), flush=True)


@torch.no_grad()
def measure(arguments: argparse.Namespace, precision: str) -> None:
    """Decode once, after a small latent has warmed the machine up, and print the numbers."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = first_stage(arguments.model).to(device).eval()
    z = torch.randn(1, 3, *arguments.latent, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device, precision):
        decoder.decode(z[:, :, :2, :2, :2])
        before, start = peak_bytes(device), time.perf_counter()
        image = decoder.decode(z).float().cpu()  # (1, 1, D, H, W)
        seconds = time.perf_counter() - start
    report: dict[str, Any] = {
        "precision": precision,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "weights": arguments.model or "random",
        "image": list(image.shape[2:]),
        "seconds": round(seconds, 2),
        "peak_gib": round(peak_bytes(device) / 2**30, 2),
        "peak_before_gib": round(before / 2**30, 2),
        "finite": bool(torch.isfinite(image).all()),
    }
    print(json.dumps(report), flush=True)


def first_stage(path: str | None) -> nn.Module:
    """The released first stage: of a model file, or random."""
    if path is not None:  # the denoiser, forty times as large, stays on disk
        network = build_first_stage(read_header(path, "latent_diffusion")["first_stage"])
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118 (not a mapping)
            load_strict(network, {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}, path)
        return network
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("import-weights", ["experiment=brain_160/released"])
    return build_first_stage({**plain(config.vae.network), "spatial_dims": 3, "in_channels": 1})


def peak_bytes(device: torch.device) -> int:
    """Highest memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
