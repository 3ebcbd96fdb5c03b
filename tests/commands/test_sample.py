"""What a table asks for: rows, counts, and columns that were meant to be covariates."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ldm.commands.sample import DEFAULT_COUNT, _count, asked_inputs, asked_rows, asked_table, run, sampling_options
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.model.latent_diffusion import SamplingOptions

SCHEMA = CovariateSchema.from_config(
    {"age": {"kind": "continuous", "range": [40, 90]}, "sex": {"kind": "categorical", "levels": ["F", "M"]}}
)
MODEL = SimpleNamespace(schema=SCHEMA)


def table(tmp_path, *lines):
    path = tmp_path / "asked.tsv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_table_gives_a_row_a_sample_and_names_not_given_stay_away(tmp_path):
    path = table(tmp_path, "participant_id\tage\tsite", "a\t70\tX", "b\tn/a\tY")
    assert asked_rows(path, asked_table(path), MODEL, {}) == [{"age": "70"}, {}]


@pytest.mark.parametrize("column", ["sexx", "Sex"])
def test_a_misspelt_column_is_an_error(tmp_path, column):
    path = table(tmp_path, f"participant_id\tage\t{column}", "a\t70\tF")
    with pytest.raises(LdmError, match=f"column '{column}' is no covariate of the model. Did you mean 'sex'"):
        asked_rows(path, asked_table(path), MODEL, {})


@pytest.mark.parametrize(
    ("covariates", "n", "expected"),
    [(None, None, DEFAULT_COUNT), ({"age": 70}, 3, 3), ("table.tsv", None, None), ("table.tsv", 8, 8)],
)
def test_how_many_samples(covariates, n, expected):
    assert _count(OmegaConf.create({"covariates": covariates, "n": n})) == expected
    assert _count(OmegaConf.create({"covariates": covariates, "n": n, "text": ["one", "two"]})) == n


def test_a_template_takes_a_file_for_each_row_of_the_table(tmp_path):
    asked = asked_table(table(tmp_path, "participant_id\tage", "a\t70", "b\tn/a"))
    config = OmegaConf.create({"mask": "{participant_id}_dseg.nii.gz", "image": {"T2": "{participant_id}_T2.nii.gz"}})
    assert asked_inputs(config, asked) == {
        "mask": ["a_dseg.nii.gz", "b_dseg.nii.gz"],
        "image": [{"T2": "a_T2.nii.gz"}, {"T2": "b_T2.nii.gz"}],
    }
    with pytest.raises(LdmError, match="no column 'participant'. Did you mean 'participant_id'"):
        asked_inputs(OmegaConf.create({"mask": "{participant}.nii.gz"}), asked)
    with pytest.raises(LdmError, match="takes its columns from a table"):
        asked_inputs(OmegaConf.create({"mask": "{participant_id}.nii.gz"}), None)


def test_settings_become_the_models_options():
    config = OmegaConf.create({"steps": 5, "sampler": "ddim", "eta": 0.5, "guidance_scale": None})
    options = sampling_options(config)
    assert options == {"num_inference_steps": 5, "sampler": "ddim", "options": {"eta": 0.5}}
    assert SamplingOptions(**options).num_inference_steps == 5
    assert sampling_options(OmegaConf.create({"steps": None})) == {}


@pytest.mark.parametrize("name", ["n", "batch_size"])
def test_a_count_below_one_is_named(name):
    with pytest.raises(LdmError, match=f"{name} must be a whole number of at least 1, got 0"):
        run(OmegaConf.create({"n": 1, "batch_size": 1} | {name: 0}))
