"""A release is the same bytes however often it was killed and however many made it; and what is refused."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from omegaconf import OmegaConf

from ldm.applications.release import (
    Release,
    asked_of,
    audit_copy,
    bids_suffixes,
    check_model,
    conditions_from,
    documents,
    read_audit,
    read_evaluation,
)
from ldm.applications.release.claims import Claims, born
from ldm.applications.release.files import gzipped, read_sums
from ldm.applications.release.work import worker_share
from ldm.commands.evaluate import facts
from ldm.commands.evaluation_images import Setup
from ldm.errors import LdmError
from tests.applications.tiny_release import AFFINE, N, content, tiny_model, tiny_plan
from tests.evaluation.test_report import FULL, distances

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def model(place):
    import torch

    torch.set_num_threads(1)
    return tiny_model(place / "model.safetensors")


@pytest.fixture(scope="module")
def whole(place, model):
    """A release made by one worker without a break."""
    session = Release(tiny_plan(model), N, place / "whole").run()
    assert session.complete
    assert session.volumes == N
    assert 0 < session.share_outside_network < 1
    return place / "whole"


@pytest.fixture(scope="module")
def others(place, model):
    """The same release by workers that are killed, by two at once, and by three with a share each."""
    command = [sys.executable, "-m", "tests.applications.tiny_release", str(place), "0"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    return place


@pytest.mark.parametrize("name", ["killed", "two", "shares"])
def test_workers_and_kills_do_not_change_a_byte(others, whole, name):
    assert content(others / name) == content(whole)


def test_the_workers_were_killed_and_the_last_one_completed_it(others):
    assert int((others / "kills.txt").read_text()) >= 6
    assert (others / "codes.txt").read_text() == "[0, 0] [3, 3, 0]"  # shares: two leave something to the others


def test_a_release_grows_without_a_change_to_what_is_there(tmp_path, model, whole):
    Release(tiny_plan(model, 5), 5, tmp_path).run()
    first = tmp_path / "shard-0001/sub-000005/anat/sub-000005_T1w.nii.gz"
    before = first.stat().st_mtime_ns
    with pytest.raises(LdmError, match="n is 4, but the release .* has 5: it can grow"):
        Release(tiny_plan(model, 4), 4, tmp_path).run()
    assert Release(tiny_plan(model), N, tmp_path).run().complete
    assert first.stat().st_mtime_ns == before
    assert content(tmp_path) == content(whole)


def test_another_run_verifies_and_makes_what_is_damaged_again(tmp_path, model):
    out = tmp_path / "out"
    Release(tiny_plan(model), N, out).run()
    before = content(out)
    assert Release(tiny_plan(model), N, out).run().volumes == 0
    damaged = out / "shard-0000/sub-000003/anat/sub-000003_T1w.nii.gz"
    data = bytearray(damaged.read_bytes())
    data[40] ^= 1  # same size
    damaged.write_bytes(data)
    (out / "shard-0001/participants.tsv").unlink()
    assert Release(tiny_plan(model), N, out).run().volumes == 2  # the micro-batch of the damaged one
    assert content(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"options": {"num_inference_steps": 3}}, "sampling.num_inference_steps was 2, is 3"),
        ({"batch_size": 4}, "batch_size was 2, is 4"),
        ({"covariates": {"age": [50, 60]}}, "conditions.sha256 was"),
        (
            {"audit": {"passed": None, "statement": None, "sha256": None, "released_without_audit": "no"}},
            "audit.passed",
        ),
    ],
)
def test_other_settings_are_refused_by_name(model, whole, change, message):
    with pytest.raises(LdmError, match=message):
        Release(tiny_plan(model, **change), N, whole).run()


def test_another_model_other_hardware_and_another_folder_are_refused(tmp_path, model, whole, monkeypatch):
    with pytest.raises(LdmError, match="model_sha256 was"):
        Release(tiny_plan(tiny_model(tmp_path / "m.safetensors", seed=1)), N, whole).run()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(LdmError, match="notes.txt and no release.json"):
        Release(tiny_plan(model), N, tmp_path / "full").run()
    Release(tiny_plan(model, 2), 2, tmp_path / "out").run()
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    with pytest.raises(LdmError, match="environment.threads was 1, is 64.*other_hardware=true"):
        Release(tiny_plan(model, 4), 4, tmp_path / "out").run()
    Release(tiny_plan(model, 4), 4, tmp_path / "out", other_hardware=True).run()
    environments = json.loads((tmp_path / "out/provenance.json").read_text())["environments"]
    assert sorted(facts["threads"] for facts in environments.values()) == [1, 64]
    rows = read_table(tmp_path / "out/shard-0000/provenance.tsv")
    assert [environments[row["environment"]]["threads"] for row in rows] == [1, 1, 64, 64]


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_each_shard_is_a_bids_data_set(whole, model):
    assert not (whole / ".release").exists()
    assert [path.name for path in sorted(whole.glob("shard-*"))] == ["shard-0000", "shard-0001"]
    people = []
    for shard in sorted(whole.glob("shard-*")):
        about = json.loads((shard / "dataset_description.json").read_text())
        assert about["Name"].startswith("tiny (synthetic)")
        assert about["BIDSVersion"]
        assert about["DatasetType"] == "raw"
        assert about["License"] == "CC0-1.0"
        assert about["GeneratedBy"][0]["Name"] == "ldm release"
        rows = read_table(shard / "participants.tsv")
        columns = json.loads((shard / "participants.json").read_text())
        assert set(rows[0]) == set(columns) == {"participant_id", "age", "sex", "synthetic"}
        assert columns["age"]["Units"] == "years"
        assert set(columns["sex"]["Levels"]) == {"F", "M"}
        found = {path.name for path in shard.glob("sub-*")}
        assert found == {row["participant_id"] for row in rows}
        for who in found:
            assert [path.name for path in (shard / who).rglob("*.*")] == [f"{who}_T1w.nii.gz"]
        allowed = {*about_files(), *(shard / ".bidsignore").read_text().split(), *found}
        assert {path.name for path in shard.iterdir()} <= allowed
        assert json.loads((shard / "T1w.json").read_text())["Synthetic"] is True
        people += rows
    assert [row["participant_id"] for row in people] == [f"sub-{k:06d}" for k in range(1, N + 1)]
    drawn = model.distribution.sample(N, 3)
    assert [float(row["age"]) for row in people] == [float(f"{row['age']:.6g}") for row in drawn]
    assert [row["sex"] for row in people] == [row["sex"] for row in drawn]
    scan = nib.load(whole / "shard-0001/sub-000006/anat/sub-000006_T1w.nii.gz")
    np.testing.assert_allclose(scan.affine, AFFINE)
    assert b"synthetic" in scan.header["descrip"].item()
    rows = [{"age": float(row["age"]), "sex": row["sex"]} for row in people]
    batch = model.sample_batches(rows[4:6], [4, 5], seed=3, batch_size=2, precision="float32")
    assert (np.asarray(scan.dataobj) == np.asarray(model.preprocessing.restore(next(batch).images[1]).dataobj)).all()


def about_files():
    return {"dataset_description.json", "participants.tsv", "participants.json", "T1w.json", "README", ".bidsignore"}


def test_every_file_has_a_checksum_and_every_text_says_synthetic(whole):
    digests = content(whole)
    listed = read_sums(whole / "SHA256SUMS")
    for shard in whole.glob("shard-*"):
        listed |= {f"{shard.name}/{name}": digest for name, digest in read_sums(shard / "SHA256SUMS").items()}
    assert listed == {name: digest for name, digest in digests.items() if name != "SHA256SUMS"}
    check = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=whole, check=False)
    assert check.returncode == 0
    for name in ("README.md", "model_card.md", "shard-0000/README", "provenance.json", "release.json"):
        assert "synthetic" in (whole / name).read_text().casefold(), name
    card = (whole / "model_card.md").read_text()
    for text in ("No formal guarantee", "brains (itself simulated)", "5" * 64, "ldm/val/loss: 0.25", "No copy found."):
        assert text in card, text
    rows = read_table(whole / "shard-0001/provenance.tsv")
    assert [(row["index"], row["seed"]) for row in rows] == [(str(k), "3") for k in (4, 5, 6)]
    assert json.loads((whole / "provenance.json").read_text())["n"] == N


# what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["participant_id\tage", "../../etc\t50"], "is a path, not an id"),
        (["participant_id\tage", "a\t50", "a\t51"], "'a' stands twice"),
        (["participant_id\tage\tnote", "a\t50\t=HYPERLINK(1)"], "starts like a formula"),
        (["age\tnote", "50\t @SUM(1)"], "starts like a formula"),
        (["age\tnote", "50\t-cmd"], "starts like a formula"),
        (["age\tnote", "50\tx\x07"], "control character U\\+0007"),
        (["age\tnote", "50\t\u202egnp"], "control character U\\+202E"),
        (["age\tnote", "50\t" + "x" * 300], "300 characters are too many"),
        (["age", "nan"], "'nan' is no value"),
        (["age", "-inf"], "'-inf' is no value"),
        (["age", "1e30"], "is absurd; the model knows 40 to 80"),
        (["age", "old"], "'old' is not a finite number"),
        (["agee\tsex", "50\tF"], "Did you mean 'age'"),
        (["age\tsex", "50\tX"], "no level 'X'"),
    ],
)
def test_hostile_and_mistaken_tables_are_refused(tmp_path, model, lines, message):
    path = tmp_path / "asked.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(LdmError, match=message):
        conditions_from(str(path), model, None, 2, 0)


def test_tables_and_grids_are_asked_in_turn(tmp_path, model):
    (tmp_path / "asked.csv").write_text("participant_id,age,sex,change\na,50,F,-1.5\nb,n/a,M,2\n")
    asked = conditions_from(str(tmp_path / "asked.csv"), model, None, 2, 0)
    assert [asked.at(k) for k in range(3)] == [{"age": 50.0, "sex": "F"}, {"sex": "M"}, {"age": 50.0, "sex": "F"}]
    grid = conditions_from({"age": [50, 60], "sex": ["F", "M"]}, model, None, 2, 0)
    assert [tuple(row.values()) for row in grid.rows] == [(50.0, "F"), (50.0, "M"), (60.0, "F"), (60.0, "M")]
    assert conditions_from({"age": 50}, model, None, 2, 0).rows == [{"age": 50.0}]
    with pytest.raises(LdmError, match="n is missing"):
        conditions_from(None, model, None, 2, 0)


PLANTED = {"n": 40, "recall": 1.0, "space": "features", "strict_recall": 0.9, "strict_space": "features"}
COPIES = {"usable": True, "count": 0, "share_at_most": 0.0117}
FOUND = {  # of ``ldm audit``
    "passed": True,
    "model_sha256": "a" * 64,
    "statement": "Nothing\nfound.",
    "lines": ["Nothing found.", "Control: all found."],
    "n": {
        "synthetic": 256,
        "train": {"scans": 50, "subjects": 48},
        "held_out": {"scans": 30, "subjects": 29},
    },
    "subjects_linked": False,
    "control": {"kinds": {"unchanged": PLANTED, "noised": PLANTED}, "untold": []},
    "spaces": {"features": {"rate": 0.05, "copies": COPIES, "noticeable_share": float("nan")}},
    "protocol": {"rate": 0.05, "alpha": 0.05, "recall": 0.95, "planted": 40, "synthetic": "/home/me/scans"},
    "worst": {"features": [{"synthetic": 3, "train": 17, "distance": float("nan"), "copy": False}]},
}


def audit_file(folder, protocol=None, **changes):
    content = FOUND | {"protocol": FOUND["protocol"] | (protocol or {})} | changes
    path = folder / "audit.json"
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return path


def test_a_missing_or_failed_audit_stops(tmp_path):
    sha = "a" * 64
    with pytest.raises(LdmError, match="audit=PATH is missing"):
        read_audit(None, sha)
    with pytest.raises(LdmError, match="the audit of this model failed: Copies."):
        read_audit(audit_file(tmp_path, passed=False, statement="Copies."), sha)
    for changes, message in (
        ({"model_sha256": "b" * 64}, "is of another model"),
        ({"passed": "yes"}, "'passed' is missing or no bool"),
        ({"statement": None}, "'statement' is missing"),
        ({"lines": None}, "'lines' is missing"),
        ({"control": {}}, "is not as `ldm audit` writes it"),
        ({"statement": "=cmd()"}, "starts like a formula"),
    ):
        for reason in (None, "only a test here"):
            with pytest.raises(LdmError, match=message):
                read_audit(audit_file(tmp_path, **changes), sha, reason)
    record = read_audit(audit_file(tmp_path), sha)
    assert record["passed"] is True
    assert record["statement"] == "Nothing found."


def test_an_audit_of_images_of_unknown_origin_does_not_serve(tmp_path):
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(FOUND | {"model_sha256": None}))
    for reason in (None, "only a test here"):
        with pytest.raises(LdmError, match=r"does not say which model drew its images.*ldm sample"):
            read_audit(path, "a" * 64, reason)


def test_an_audit_of_images_that_were_drawn_otherwise_does_not_serve(tmp_path, model):
    drawn = {"sampler": "ddim", "num_inference_steps": 20, "guidance_interval": None}
    path, sha = audit_file(tmp_path, protocol={"sampling": drawn}), "a" * 64
    assert read_audit(path, sha, None, drawn)["drawn_otherwise"] is None
    with pytest.raises(LdmError, match=r"num_inference_steps 20 there, 5 here.*ldm audit"):
        read_audit(path, sha, None, drawn | {"num_inference_steps": 5})
    with pytest.raises(LdmError, match="it does not say how they were"):
        read_audit(audit_file(tmp_path), sha, None, drawn)
    audit_file(tmp_path, protocol={"sampling": drawn})
    record = read_audit(path, sha, "only a test here", drawn | {"num_inference_steps": 5})
    Release(tiny_plan(model, 1, audit=record), 1, tmp_path / "out").run()
    card = (tmp_path / "out/model_card.md").read_text()
    assert "drawn otherwise (num_inference_steps 20 there, 5 here)" in card
    assert "only a test here" in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": {"recall": 0.9}}, "recall is 0.9, legal: 0.95 or more"),
        ({"protocol": {"rate": 0.2}}, "20.0% of unrelated scans may lie below a threshold, legal: up to 5%"),
        ({"spaces": {"features": {"rate": 0.1, "copies": COPIES}}}, "10.0% of unrelated scans"),  # of few held out
        ({"protocol": {"alpha": 1e-9}}, "alpha is 1e-09"),
        ({"control": {"kinds": {"unchanged": PLANTED | {"n": 5}}, "untold": []}}, "5 copies of a kind were planted"),
        ({"control": {"kinds": {"unchanged": PLANTED}}}, "it does not say that all planted copies can be told"),
    ],
)
def test_a_weak_audit_does_not_serve_and_going_on_with_it_is_recorded(tmp_path, model, changes, said):
    path, sha = audit_file(tmp_path, **changes), "a" * 64
    with pytest.raises(LdmError, match=f"is too weak to release by: {said}.*release_without_audit"):
        read_audit(path, sha)
    record = read_audit(path, sha, "only a test here")
    assert said in documents.audit_statement(tiny_plan(model, 1, audit=record))
    assert record["released_without_audit"] == "only a test here"


def test_an_audit_of_images_that_were_asked_otherwise_does_not_serve(tmp_path, model):
    given = [{"age": 50, "sex": "F"}, {"age": 60, "sex": "M"}]
    folder = {"rows": [given[i % 2] for i in range(5)], "seed": 0}
    drawn = {"rows": model.covariate_rows(None, 5, 7), "seed": 7}
    grid, none = (conditions_from(asked, model, 6, 2, 0) for asked in (given, None))
    assert read_audit(asked_file(tmp_path, folder, model), "a" * 64, conditions=grid)["drawn_otherwise"] is None
    assert read_audit(asked_file(tmp_path, drawn, model), "a" * 64, conditions=none)["drawn_otherwise"] is None
    whole = {"conditions": {"source": grid.source, "sha256": grid.sha256(4)}, "n": 4}  # of a release
    assert read_audit(asked_file(tmp_path, whole, model), "a" * 64, conditions=grid)["drawn_otherwise"] is None
    for images, conditions, said in (
        (drawn, grid, "asked for draws from the training distribution there, covariates that were given here"),
        (folder, none, "asked for covariates that were given there, draws from the training distribution here"),
        (folder | {"rows": given[::-1]}, grid, "the 2 images were not asked for what the first 2 of the release are"),
        (folder | {"inputs": {"mask": ["a"]}}, grid, "they were given mask, which a release gives none"),
        ({}, grid, "it does not say what they were asked for"),
    ):
        with pytest.raises(LdmError, match=said):
            read_audit(asked_file(tmp_path, images, model), "a" * 64, conditions=conditions)


def asked_file(folder, images, model):
    return audit_file(folder, protocol={"conditions": asked_of(images, model)})


def test_an_audit_rides_along_without_what_points_to_a_training_scan(tmp_path, model):
    path = audit_file(tmp_path)
    plan = tiny_plan(model, 1, audit=read_audit(path, "a" * 64), audit_copy=audit_copy(path, "a" * 64))
    Release(plan, 1, tmp_path / "out").run()
    public = json.loads((tmp_path / "out/audit.json").read_text())
    assert public["n"] == FOUND["n"]
    assert public["spaces"]["features"]["noticeable_share"] is None
    assert public["protocol"]["recall"] == 0.95
    assert "worst" not in public
    assert "scans" not in public["protocol"].get("synthetic", "")
    assert "audit.json" in read_sums(tmp_path / "out/SHA256SUMS")
    for name in ("model_card.md", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        for said in ("256 synthetic; training: 50 scans of 48 subjects", "noised 100% of 40", "noised 90%", "1.17%"):
            assert said in text, (name, said)
        assert "does not say which scans are of one person" in text
        assert "/home/me" not in text
    card = (tmp_path / "out/model_card.md").read_text()
    assert all(line in card for line in FOUND["lines"])
    assert audit_copy(None, "a" * 64) is None


def test_damaged_checksums_are_made_again(tmp_path, model):
    Release(tiny_plan(model, N), N, tmp_path).run()
    whole = content(tmp_path)
    for name, damage in (("SHA256SUMS", b"\x00\xff"), ("shard-0000/SHA256SUMS", b"not a digest\n")):
        (tmp_path / name).write_bytes(damage)
        Release(tiny_plan(model, N), N, tmp_path).run()
        assert content(tmp_path) == whole


@pytest.mark.parametrize("damage", ["truncated", "another number"])
def test_damaged_documents_are_made_again_and_no_volume_is(tmp_path, model, damage):
    Release(tiny_plan(model, N), N, tmp_path).run()
    whole = content(tmp_path)
    for name in ("provenance.json", "shard-0001/provenance.tsv"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text[:100] if damage == "truncated" else text.replace("1", "7"))
    assert Release(tiny_plan(model, N), N, tmp_path).run().volumes == 0
    assert content(tmp_path) == whole
    assert not subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=False).returncode


def test_a_release_grows_though_its_provenance_is_damaged(tmp_path, model, whole):
    Release(tiny_plan(model, 5), 5, tmp_path).run()
    (tmp_path / "provenance.json").write_text("{")
    table = tmp_path / "shard-0000/provenance.tsv"
    table.write_text(table.read_text()[:-100])
    assert Release(tiny_plan(model), N, tmp_path).run().complete
    assert content(tmp_path) == content(whole)


def test_what_draws_no_images_by_diffusion_is_refused():
    gan = SimpleNamespace(what="LSGAN", classes=None)
    with pytest.raises(LdmError, match="this model is a LSGAN: use ldm sample"):
        check_model(gan)


def test_an_override_needs_words_and_is_recorded(tmp_path, model):
    sha = "a" * 64
    with pytest.raises(LdmError, match="say in words why"):
        read_audit(None, sha, "yes")
    with pytest.raises(LdmError, match="but the audit passed"):
        read_audit(audit_file(tmp_path), sha, "no time for that")
    failed = read_audit(audit_file(tmp_path, passed=False), sha, "a test of the tool")
    none = read_audit(None, sha, "for our course only")
    for audit, texts in ((failed, ("FAILED", "a test of the tool")), (none, ("NOT audited", "for our course only"))):
        out = tmp_path / texts[1].replace(" ", "_")
        Release(tiny_plan(model, 1, audit=audit), 1, out).run()
        for text in texts:
            assert text in (out / "model_card.md").read_text()
            assert text in (out / "shard-0000/README").read_text()
        assert json.loads((out / "provenance.json").read_text())["audit"]["released_without_audit"] == texts[1]


def evaluation_file(folder, **changes):
    path = folder / "metrics.json"
    path.write_text(json.dumps({"model_sha256": "a" * 64, "sampling": {"num_inference_steps": 2}, **FULL, **changes}))
    return path


def test_an_evaluation_gives_what_was_measured_of_samples(tmp_path, model):
    frechet = {"untrusted": {"recall": ["blurred"]}}
    path = evaluation_file(tmp_path, distances=distances(**frechet), seeds=[0], goals={"share": 0.9})
    found = read_evaluation(path, "a" * 64, {"num_inference_steps": 2})
    assert [one["status"] for one in found["verdicts"]] == ["met", "met", "met"]
    assert found["measured"]["age: r"] == {side: {"value": 0.8, "interval": [0.7, 0.9]} for side in ("samples", "real")}
    assert found["measured"]["age: mean error in years"]["samples"] == {"value": 3.0, "interval": None}
    assert found["measured"]["MS-SSIM of two images"]["real"] == {"value": 0.6, "interval": [0.5, 0.7]}
    assert {"Fréchet distance", "KID", "coverage"} < set(found["measured"])
    assert "recall" not in found["measured"]
    assert found["untrusted"] == ["recall"]
    Release(tiny_plan(model, 1, evaluation=found), 1, tmp_path / "out").run()
    card = (tmp_path / "out/model_card.md").read_text()
    for said in ("* Do generated images look like real ones? Met. ", "* age: r: 0.8 (0.7 to 0.9); 0.8 (0.7 to 0.9)"):
        assert said in card
    assert "known to be worse below real ones: recall." in card
    for unsaid in ("seeds", "bandwidth", "blurred:", "goals"):
        assert unsaid not in card


def test_an_evaluation_says_how_its_samples_were_drawn(tmp_path, model):
    cohort = SimpleNamespace(name="brains", split_hash="5" * 64)
    config, datamodule = OmegaConf.create({"steps": 5, "n": 3}), SimpleNamespace(cohort=cohort)
    setup = Setup(config, model, tmp_path, datamodule, None, {}, {}, [], [0], {})
    drawn = facts(setup, SimpleNamespace(real=[None], samples=[None] * 3))["sampling"]
    path, asked = evaluation_file(tmp_path, sampling=drawn), {"num_inference_steps": 5}
    assert read_evaluation(path, "a" * 64, vars(model.settings(asked)))["verdicts"]
    with pytest.raises(LdmError, match="num_inference_steps 5 there, 2 here"):
        read_evaluation(path, "a" * 64, vars(model.settings({})))


def test_an_evaluation_of_another_model_or_other_samples_is_refused(tmp_path):
    with pytest.raises(LdmError, match="evaluation=.* is of another model"):
        read_evaluation(evaluation_file(tmp_path), "b" * 64)
    for changes, message in (
        ({}, "num_inference_steps 2 there, 20 here"),
        ({"sampling": None}, "it does not say how they were.*ldm evaluate"),
    ):
        with pytest.raises(LdmError, match=message):
            read_evaluation(evaluation_file(tmp_path, **changes), "a" * 64, {"num_inference_steps": 20})
    for changes, message in (
        ({"fidelity": {"age": 3}}, "is not as `ldm evaluate` writes it"),
        ({"distances": {"rows": {}}}, "is not as `ldm evaluate` writes it"),
        ({"fidelity": {"=cmd()": FULL["fidelity"]["age"]}}, "starts like a formula"),
    ):
        with pytest.raises(LdmError, match=message):
            read_evaluation(evaluation_file(tmp_path, **changes), "a" * 64)


def test_suffixes_come_from_channels_or_the_cohorts_files():
    assert bids_suffixes(("T1", "flair"), None) == {"T1": "T1w", "flair": "FLAIR"}
    assert bids_suffixes(("image",), None, "x/{participant_id}_T2w.nii.gz") == {"image": "T2w"}
    assert bids_suffixes(("image",), "ct") == {"image": "ct"}
    for channels, given, message in (
        (("image",), None, "channel 'image' does not say what it shows"),
        (("image",), "../T1w", "is not legal"),
        (("T1", "t1w"), None, "two channels share one"),
        (("T1",), {"T2": "T2w"}, "for the channels T1"),
    ):
        with pytest.raises(LdmError, match=message):
            bids_suffixes(channels, given)


# parts -----------------------------------------------------------------------------------------------


def test_compressed_bytes_hold_no_time_and_no_name():
    data = os.urandom(1000) + bytes(1000)
    assert gzip.decompress(gzipped(data)) == data
    assert gzipped(data)[:10] == bytes([31, 139, 8, 0, 0, 0, 0, 0, 0, 255])


def test_a_claim_is_one_workers_until_it_is_dead_or_silent(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take("a")
    assert not second.take("a")
    first.release("a")
    assert second.take("a")
    os.utime(tmp_path / "a", (1, 1))  # silent since 1970
    assert first.take("a")
    assert not second.take("a")
    owner = json.loads((tmp_path / "a").read_text())
    (tmp_path / "a").write_text(json.dumps({**owner, "pid": 2**30}))  # no such process
    assert second.take("a")
    (tmp_path / "a").write_text("")  # killed before it could write who it is
    assert not first.take("a")
    assert born(os.getpid()) is not None
    with Claims(tmp_path, stale_after=1.0) as third:
        third.take("b")
        os.utime(tmp_path / "b", (1, 1))
        third._end.wait(0.5)
        assert not first.take("b")  # touched meanwhile


def test_shares_of_workers(monkeypatch):
    assert worker_share("auto") is None
    assert worker_share("1/4") == (1, 4)
    for illegal in ("4/4", "-1/2", "x"):
        with pytest.raises(LdmError, match="worker is"):
            worker_share(illegal)
    with pytest.raises(LdmError, match="no task of an array job"):
        worker_share("slurm")
    for name, value in (("ID", "5"), ("MIN", "1"), ("COUNT", "3"), ("STEP", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert worker_share("slurm") == (2, 3)


def test_release_through_the_command_line(ldm, model, place, tmp_path):
    request = ("release", f"model={place / 'model.safetensors'}", "license=CC0-1.0", "out=out", "seed=1")
    assert "audit=PATH is missing" in ldm(*request, "n=1")[1]
    reason = "release_without_audit='only a test of this'"
    code, text = ldm(*request, reason, "covariates={age: [50, 60], sex: [F, M]}", "repeats=2", "name=grid")
    assert code == 0, text
    assert "8 volumes, complete" in text
    assert "% of the time outside the network" in text
    rows = read_table(tmp_path / "out/shard-0000/participants.tsv")
    assert [(row["age"], row["sex"]) for row in rows[3:6]] == [("60", "M"), ("50", "F"), ("50", "M")]
    code, text = ldm(*request, reason, "n=8", "covariates={age: [50, 60], sex: [F, M]}", "name=other")
    assert code
    assert "name was grid, is other" in text
    assert "n is -3; legal: 1 to 999,999, as a whole number" in ldm(*request, "n=-3", reason)[1]
    assert ldm(*request, "n=1", reason, "license=null")[1].count("license is missing")
