"""A small cohort of pictures in two sequences; half of them have a lesion, bright in FLAIR."""

import numpy as np
import PIL.Image

SIDE = 16
DATA = (
    "data=nifti",
    "data.name=blobs",
    "data.spatial_dims=2",
    "data.subject=patient",
    "data.image={T1: 'T1/{participant_id}.png', FLAIR: 'FLAIR/{participant_id}.png'}",
    "data.labels='mask/{participant_id}.png'",
    "data.label_names={lesion: 1}",
    "data.covariates={diseased: {kind: categorical, levels: [0, 1]}}",
    "data.split.column=split",
    "data.intensity={kind: window, lower: 0, upper: 255}",
    "data.num_workers=0",
    "vae=identity",
    "trainer=cpu",
    "trainer.log_every=10",
)
SMALL = (
    "ldm.network.channels=[16,32]",
    "ldm.network.attention_levels=[false,false]",
    "ldm.network.num_res_blocks=1",
    "ldm.network.norm_num_groups=8",
    "ldm.optimizer={lr: 3e-3, warmup_steps: 10}",
    "ldm.condition={drop_rate: 0.0, drop_all_rate: 0.3}",
    "ldm.ema_decays=[0.98]",
    "ldm.val_samples=0",
    "ldm.batch_size=8",
    "classifier.batch_size=8",
    "classifier.network={channels: [16,32], attention_levels: [false,false], norm_num_groups: 8}",
    "classifier.optimizer={lr: 2e-3, warmup_steps: 10}",
)


def write_blobs(root, patients=48, seed=0, test=8):
    """Two pictures a patient, one of them diseased; a table; masks. Returns ``root``."""
    rng, rows = np.random.default_rng(seed), []
    grid = np.stack(np.mgrid[:SIDE, :SIDE])
    for name in ("T1", "FLAIR", "mask"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for patient in range(patients):
        split = "test" if patient < test else "valid" if patient < 2 * test else "train"
        for diseased in (0, 1):
            name = f"p{patient}-{diseased}"
            disc = np.linalg.norm(grid - 7.5 - rng.uniform(-0.5, 0.5, (2, 1, 1)), axis=0) < 6.5
            centre, radius = rng.uniform(5, 10, (2, 1, 1)), rng.uniform(1.5, 2.5)
            lesion = (np.linalg.norm(grid - centre, axis=0) < radius) & disc & bool(diseased)
            flair = 70 * disc + 130 * lesion
            t1 = 120 * disc - 30 * lesion
            for folder, image in (("T1", t1), ("FLAIR", flair)):
                noisy = (image + rng.normal(10, 4, image.shape)).clip(0, 255).astype(np.uint8)
                PIL.Image.fromarray(noisy).save(root / folder / f"{name}.png")
            PIL.Image.fromarray(lesion.astype(np.uint8)).save(root / "mask" / f"{name}.png")
            rows.append(f"{name}\tpatient{patient}\t{diseased}\t{split}\n")
    (root / "participants.tsv").write_text("participant_id\tpatient\tdiseased\tsplit\n" + "".join(rows))
    return root
