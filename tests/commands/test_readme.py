"""The README's commands for one's own scans, through a real shell and make."""

import os
import shlex
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np

import ldm as package

ROOT = Path(package.__file__).parents[1]


def study(folder):
    """Twelve volumes and a table, as the README describes them."""
    rng, lines = np.random.default_rng(0), ["participant_id\tage\tsex"]
    (folder / "T1").mkdir(parents=True)
    for k in range(12):
        nib.save(nib.Nifti1Image(rng.random((16, 16, 16), np.float32), np.eye(4)), folder / f"T1/sub-{k:03}.nii.gz")
        lines.append(f"sub-{k:03}\t{50 + k}\t{'FM'[k % 2]}")
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")


def arguments_of(command):
    """What ``ldm`` would be given: the last line of make's recipe, read by a shell."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    make = ["make", "--dry-run", *shlex.split(command)[1:]]
    recipe = subprocess.run(make, cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {recipe.strip().splitlines()[-1]}"], capture_output=True, text=True
    )
    return shown.stdout.splitlines()[1:]


def test_the_first_command_for_own_scans_runs_as_printed(ldm, tmp_path):
    text = (ROOT / "README.md").read_text()
    command = text[text.index("make check") : text.index("make train-vae")].replace("\\\n", " ")
    arguments = arguments_of(command)
    assert arguments[0] == "check"
    study(tmp_path / "study")
    code, shown = ldm(*arguments)
    assert code == 0, shown
    assert "No faults" in shown
