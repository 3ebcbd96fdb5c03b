"""Volumes on the latents of a first stage: maps and counterparts come back on each input's own grid."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ldm.applications.detection import INTENSITIES

pytestmark = pytest.mark.slow


def test_volumes_come_back_in_their_own_space(ldm, tiny, tmp_path, cohort_root):
    steps = ("trainer.max_steps=1", "trainer.val_every=1")
    small = ("classifier.network={channels: [16,16], attention_levels: [false,false], norm_num_groups: 16}",)
    for verb in ("train-vae", "train-ldm", "train-classifier"):
        code, text = ldm(verb, *tiny, *small, *steps)
        assert not code, text
    common = ("detect", *tiny, "steps=4", "batch_size=16", "healthy=F", "resamples=5")

    # two scans, one of them turned, cropped and told in other axes
    scans = tmp_path / "scans"
    scans.mkdir()
    table = pd.read_csv(cohort_root / "participants.tsv", sep="\t").head(2)
    rows = []
    for k, name in enumerate(table["participant_id"]):
        scan = nib.load(cohort_root / name / "anat" / f"{name}_T1w.nii.gz")
        scan = scan.slicer[1:, :, :-1].as_reoriented(nib.orientations.axcodes2ornt("PIR")) if k else scan
        nib.save(scan, scans / f"{name}.nii.gz")
        rows.append(f"{name}\t{'FM'[k]}\n")
        if not k:  # the same scan, its axes stored otherwise
            nib.save(scan.as_reoriented(nib.orientations.axcodes2ornt("PIR")), scans / "turned.nii.gz")
            rows.append("turned\tF\n")
    (tmp_path / "sexes.tsv").write_text("participant_id\tsex\n" + "".join(rows))
    code, text = ldm(*common, "images=scans", "table=sexes.tsv", "out=out", "threshold=0.2")
    assert not code, text
    for name in table["participant_id"]:
        scan = nib.load(scans / f"{name}.nii.gz")
        written = {kind: nib.load(tmp_path / f"out/{name}_{kind}.nii.gz") for kind in ("healthy", "anomaly", "lesion")}
        for image in written.values():
            assert image.shape == scan.shape
            np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)
        anomaly = written["anomaly"].get_fdata()
        assert anomaly.min() >= 0
        assert anomaly.max() > 0.1
        assert set(np.unique(written["lesion"].get_fdata())) <= {0, 1}
    for kind in ("healthy", "anomaly"):
        one, turned = (
            nib.load(tmp_path / f"out/{name}_{kind}.nii.gz") for name in (table["participant_id"][0], "turned")
        )
        assert nib.aff2axcodes(turned.affine) != nib.aff2axcodes(one.affine)
        back = nib.as_closest_canonical(turned).get_fdata()
        expected = nib.as_closest_canonical(one).get_fdata()
        np.testing.assert_allclose(back, expected, atol=0.02 * expected.max())
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["methods"]) == {"classifier", "partial_noising", "reconstruction", *INTENSITIES}
    assert "pixel_auroc" not in metrics["methods"]["classifier"]  # no masks

    code, text = ldm(*common, "tune=true", "sweep={split: all, levels: [500], scales: [1, 10]}", "lesion=[ventricles]")
    assert not code, text
    entry = json.loads((tmp_path / "runs/simulated/ldm/detection.json").read_text())["guides"]["classifier"]
    assert set(entry["baselines"]) == {"partial_noising", "reconstruction", *INTENSITIES}
    code, text = ldm(*common, "lesion=[ventricle]", "out=refused")
    assert code
    assert "no class 'ventricle'. Did you mean 'ventricles'?" in text
