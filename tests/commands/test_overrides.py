"""The command line says what is wrong before anything runs."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from ldm.commands.main import conf_dir
from ldm.commands.overrides import check_overrides, quote_templates, replace_free_form
from ldm.errors import LdmError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train-va"], "There is no verb 'train-va'. Did you mean 'train-vae'?"),
        (["train-vae", "vae.optimiser.lr=1"], "no setting 'vae.optimiser.lr'. Did you mean 'vae.optimizer.lr'?"),
        (["train-ldm", "trainer.max_tiem=1"], "no setting 'trainer.max_tiem'. Did you mean 'trainer.max_time'?"),
        (["sample", "step=10"], "no setting 'step'. Did you mean 'steps'?"),
        (["train-ldm", "init_from=m.safetensors"], "no setting 'init_from'. Did you mean 'ldm.init_from'?"),
        (["check", "data=nift"], "Did you mean 'nifti'?"),
        (["check", "data.root='unclosed"], "does not parse"),
        (["train-vae", "trainer.max_time=1h", "data.root=nowhere"], "'1h' is not a time; legal: DD:HH:MM:SS"),
        (["train-vae", "+trainer.maxsteps=3", "trainer.max_steps=1"], "trainer.maxsteps is not a setting"),
    ],
)
def test_a_misspelt_word_is_named_with_its_neighbour(ldm, tiny, arguments, expected):
    verb, *rest = arguments
    code, text = ldm(verb, *(tiny if "+trainer.maxsteps=3" in rest else ()), *rest)
    assert code
    assert expected in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data.image=T1/{participant_id}.nii.gz", "data.image='T1/{participant_id}.nii.gz'"),
        ("data.image={file:path}", "data.image={file:path}"),
        ("data.id={participant_id}_{session}", "data.id='{participant_id}_{session}'"),
        ("data.image=a/{subject}.nii::axial[{slice}]", "data.image='a/{subject}.nii::axial[{slice}]'"),
        ("data.image='T1/{participant_id}.nii.gz'", "data.image='T1/{participant_id}.nii.gz'"),
        ("data.covariates={age: {kind: continuous}}", "data.covariates={age: {kind: continuous}}"),
        ("out=${runs_dir}/{a}", "out=${runs_dir}/{a}"),
        ("seed=0,1,2", "seed=0,1,2"),
        ("a=choice({x:1})", "a=choice({x:1})"),
        ("data.image={a}/x,{b}/x", "data.image={a}/x,{b}/x"),
        ("--multirun", "--multirun"),
    ],
)
def test_templates_need_no_second_pair_of_quotes(typed, meant):
    assert quote_templates([typed]) == [meant]


def test_hydra_s_own_plugins_can_be_chosen():
    check_overrides(conf_dir(), "train-vae", ["hydra/launcher=basic", "hydra.sweep.dir=elsewhere", "seed=0,1"])
    with pytest.raises(LdmError, match=r"cannot be put together.*hydra/launcher/submitit_slrm"):
        check_overrides(conf_dir(), "train-vae", ["hydra/launcher=submitit_slrm"])


def test_files_that_do_not_fit_together_are_named(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ndata: {instrument: [a, b]}\n")
    (tmp_path / "check.yaml").write_text("defaults: [_self_, {experiment: null}]\ndata: {instrument: {kind: a}}\n")
    with pytest.raises(LdmError, match=r"cannot be put together: In 'experiment/mine'.*"):
        check_overrides(tmp_path, "check", ["experiment=mine"])


def test_a_missing_first_stage_says_what_to_run(ldm, tiny):
    code, text = ldm("train-ldm", "data=nifti", *tiny, "data.name=study", "ldm.batch_size=2", "trainer.max_steps=1")
    assert code
    assert f"ldm train-vae data=nifti {tiny[0]}" in text  # the same data, as typed
    assert "data.name=study" in text
    assert "trainer.max_steps" not in text


def test_a_root_that_was_not_given_is_asked_for(ldm):
    code, text = ldm("check", "data=nifti")
    assert code
    assert "data.root is not set" in text


def test_a_missing_model_says_what_to_run(ldm, tiny):
    code, text = ldm("sample", *tiny)
    assert code
    assert "ldm train-ldm" in text


def test_a_name_alone_does_not_say_what_to_train_on(ldm):
    code, text = ldm("sample", "data.name=study")
    assert code
    assert "ldm train-ldm data=... data.name=study" in text


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m ldm check --help | head -n 1"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "ldm check" in shown.stdout
    assert not shown.stderr


@pytest.mark.parametrize(
    "verb",
    [
        "check",
        "train-vae",
        "train-ldm",
        "train-segmenter",
        "train-predictor",
        "train-classifier",
        "detect",
        "sample",
        "evaluate",
    ],
)
def test_help_explains_the_verb(ldm, verb):
    code, text = ldm(verb, "--help")
    assert not code
    assert f"ldm {verb}" in text
    assert "data: " in text  # the groups


def test_named_channels_replace_those_of_the_cohort():
    arguments = ["data=brats", "data.root=somewhere", "data.image={T1: a.nii.gz}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert dict(compose("check", replace_free_form(arguments)).data.image) == {"T1": "a.nii.gz"}
        one = quote_templates(["data=nifti", "data.image=T1/{participant_id}.nii.gz"])
        assert compose("check", replace_free_form(one)).data.image == "T1/{participant_id}.nii.gz"
