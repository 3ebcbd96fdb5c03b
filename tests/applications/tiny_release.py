"""A tiny model and its releases; run as a script, workers that are killed and workers side by side, each a process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ldm.applications.release import Plan, Release, conditions_from, work
from ldm.data.distribution import CovariateDistribution
from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate, CovariateSchema
from ldm.latents.space import LatentSpace
from ldm.model.latent_diffusion import LatentDiffusionModel

N = 7  # with micro-batches of 2 and shards of 4: 4 micro-batches in 2 shards, the last one half empty
SCHEMA = CovariateSchema(
    [Covariate("age", "continuous", "years", (40.0, 80.0)), Covariate("sex", "categorical", levels=("F", "M"))]
)
AUDIT = {"passed": True, "statement": "No copy found.", "sha256": "0" * 64, "released_without_audit": None}
AFFINE = np.diag([-2.0, 2.0, 2.0, 1.0])


def tiny_model(path: Path, seed: int = 0) -> LatentDiffusionModel:
    """A 3-D model of 8 x 8 x 8 voxels without training, from its file."""
    torch.manual_seed(seed)
    header = {
        "cohort": "brains",
        "simulated": True,
        "split_sha256": "5" * 64,
        "first_stage": {"kind": "identity", "spatial_dims": 3, "in_channels": 1},
        "first_stage_sha256": "f" * 64,
        "latent_shape": [1, 8, 8, 8],
        "denoiser": {
            "channels": [8, 8],
            "num_res_blocks": 1,
            "attention_levels": [False, False],
            "norm_num_groups": 4,
            "num_head_channels": 8,
        },
        "condition": {"mode": "concat", "dim": 8, "drop_rate": 0.1, "drop_all_rate": 0.1},
        "schedule": {"beta_schedule": "linear"},
        "prediction_type": "v_prediction",
        "sampling": {"num_inference_steps": 2},
        "metrics": {"ldm/val/loss": 0.25},
        "steps": 12,
        "seed": seed,
    }
    preprocessing = Preprocessing(
        3,
        "RAS",
        shape=(8, 8, 8),
        intensity=IntensityRecipe(),
        channels=("T1",),
        reference=Geometry.plan((8, 8, 8), AFFINE, "RAS", space_code=4),
    )
    rng = np.random.default_rng(0)
    rows = [{"age": float(rng.uniform(45, 75)), "sex": "FM"[i % 2]} for i in range(40)]
    distribution = CovariateDistribution.fit(SCHEMA, rows)
    made = LatentDiffusionModel(header, LatentSpace.identity(1), preprocessing, SCHEMA, distribution)
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    made.save(path)
    return LatentDiffusionModel.load(path)


def tiny_plan(model: LatentDiffusionModel, n: int = N, covariates=None, **settings) -> Plan:
    """Shards of four, micro-batches of two."""
    settings = {"batch_size": 2, "shard_size": 4, "audit": AUDIT, "precision": "float32", "seed": 3, **settings}
    conditions = conditions_from(covariates, model, n, settings["batch_size"], settings["seed"])
    return Plan(model, conditions, "tiny", "CC0-1.0", {"T1": "T1w"}, **settings)


def content(out: Path) -> dict[str, str]:
    """File -> SHA-256 of everything in a release but its timings."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and work.SESSIONS not in path.parts)
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_at(step: int) -> None:
    """Let the process kill itself at its ``step``-th file operation: half a file on disk, a file not renamed, ..."""
    left = [step]

    def wrapped(function):
        def one(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if function is fsync:
                    with contextlib.suppress(OSError):  # a folder has no halves
                        os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return one

    fsync = os.fsync
    os.fsync, os.replace, os.open, os.link = map(wrapped, (os.fsync, os.replace, os.open, os.link))


def fork(task) -> int:
    """Run ``task`` in a process of its own; returns its number."""
    pid = os.fork()
    if pid == 0:
        task()
        os._exit(0)
    return pid


def main(folder: Path) -> None:
    """Releases: ``killed`` again and again, ``two`` workers at once, ``shares`` one after the other."""
    torch.set_num_threads(1)
    work.POLL = 0.05
    plan = tiny_plan(LatentDiffusionModel.load(folder / "model.safetensors"))
    chance = random.Random(int(sys.argv[2]))

    def worker(out: str, share: str = "auto", kill: int | None = None) -> None:
        if kill is not None:
            killed_at(kill)
        complete = Release(plan, N, folder / out, share).run().complete
        os._exit(0 if complete else 3)

    steps = [chance.randint(1, 30) for _ in range(12)]
    ends = [os.waitpid(fork(lambda step=step: worker("killed", kill=step)), 0)[1] for step in (*steps, None)]
    (folder / "kills.txt").write_text(str(ends.count(signal.SIGKILL)))
    assert ends[-1] == 0
    pids = [fork(lambda: worker("two")) for _ in range(2)]
    time.sleep(0.2)
    os.kill(pids[0], signal.SIGKILL)  # one of them dies, perhaps within a claim; the other has to finish
    pids.append(fork(lambda: worker("two")))
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    shares = [os.waitpid(fork(lambda k=k: worker("shares", f"{k}/3")), 0)[1] for k in range(3)]
    (folder / "codes.txt").write_text(f"{codes[1:]} {[os.waitstatus_to_exitcode(code) for code in shares]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
