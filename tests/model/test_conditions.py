"""A model that is conditioned on several things: one file, what it may be given, guidance by part, and transfer."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.commands.nulls import check_nulls, lacking, learned_nulls
from ldm.conditioning.build import complete
from ldm.data.geometry import Geometry
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel, SamplingOptions
from ldm.model.transfer import start_from
from tests.model.test_sampling import record_calls
from tests.model.test_transfer import AGE, SEX, VOLUME, model

TEXT = {"caption": "a [{age:.0f}-year-old ]{sex:woman|man}", "dim": 16, "num_heads": 2, "max_tokens": 12}
OPTIONS = {"num_inference_steps": 2, "precision": "float32"}


def conditioned(schema=(SEX, AGE), mode="adaptive_norm", labels=None, text=TEXT, seed=0, way="concat"):
    conditioners, labels = {"mask": {"mode": way}, "text": text}, labels or {"csf": 1, "grey": 2}
    described = complete(conditioners, CovariateSchema(schema), labels, ("a", "b", "c"), 1)
    return model(list(schema), mode, seed=seed, conditioners=described)


def test_one_file_is_enough_for_masks_and_texts(tmp_path):
    made = conditioned()
    made.save(tmp_path / "m.safetensors")
    again = LatentDiffusionModel.load(tmp_path / "m.safetensors")
    mask = np.eye(8, dtype=np.uint8)
    first, second = (one.sample(mask=mask, text="a man", n=2, **OPTIONS) for one in (made, again))
    assert (first.images == second.images).all()
    assert first.covariates == [{}, {}]
    for other in ({"mask": 2 * mask, "text": "a man"}, {"mask": mask, "text": "a woman"}, {"mask": mask}):
        assert np.abs(made.sample(n=2, **other, **OPTIONS).images - first.images).max() > 1e-5, other


def test_a_row_is_told_as_a_caption_unless_there_is_a_text():
    made = conditioned()
    text = made.network.conditioners["text"]
    rows = [{"age": 70.0, "sex": "F"}, {"age": 70.0, "sex": "F"}, {}]
    tokens = made.encode_condition(rows, {"text": [None, "", None]})["text"]
    assert tokens[0].tolist() == text.encode("a 70-year-old woman", {}, ()).tolist()
    assert (tokens[1:] == -1).all()
    batch = {"covariates": made.encode_condition(rows[:1])["covariates"], "labels": torch.zeros(1, 3, 8, 8)}
    assert made.batch_condition(batch)["text"].tolist() == tokens[:1].tolist()  # training tells it likewise


def test_a_row_at_a_bound_is_told_as_in_training():
    """65 of 20 to 90 years comes back from its code as a little less, in training and in sampling."""
    words = {**TEXT, "caption": "a {age<65:young|old} {sex:woman|man}"}
    made = conditioned((SEX, replace(AGE, range=(20.0, 90.0))), text=words)
    for age in (64.0, 65.0, 66.0):
        asked = made.encode_condition([{"age": age, "sex": "F"}])
        batch = {"covariates": asked["covariates"], "labels": torch.zeros(1, 3, 8, 8)}
        assert made.batch_condition(batch)["text"].tolist() == asked["text"].tolist(), age


def test_lists_are_one_a_sample():
    made = conditioned()
    rows, inputs = made.requests([{"age": 50}], {"text": ["a man", "a woman", "a"], "mask": "m.nii"}, None)
    assert rows == [{"age": 50}] * 3
    assert inputs == {"text": ["a man", "a woman", "a"], "mask": ["m.nii"] * 3}
    assert len(made.requests(None, {"text": ["a", "b"]}, 5)[1]["text"]) == 5


def test_what_a_model_does_not_know_is_refused():
    with pytest.raises(LdmError, match="not conditioned on 'mask'; legal beside covariates: nothing"):
        model([AGE], "concat").sample(mask=np.zeros((8, 8)))
    with pytest.raises(LdmError, match="not conditioned on 'image'; legal beside covariates: mask, text"):
        conditioned().sample(image="T2.nii.gz")
    with pytest.raises(LdmError, match=r"\(9, 8\) is not on the model's grid; legal: \(8, 8\)"):
        conditioned().sample(mask=np.zeros((9, 8)))


def test_guidance_by_conditioner_and_none_at_scale_one():
    made = conditioned()
    condition = made.encode_condition([{"age": 50.0, "sex": "F"}] * 2, {"mask": [np.eye(8)] * 2, "text": ["a man"] * 2})
    step = next(iter(made.schedule.grid(3)))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioners = made.network.conditioners
    with torch.no_grad():
        whole, no_mask, nothing = made.denoise_many(
            x, step, [condition, conditioners.without(condition, "mask"), conditioners.null(condition)]
        )
        for scale, expected, size in (
            ({"mask": 2.5, "text": 1.0}, whole.eps + 1.5 * (whole.eps - no_mask.eps), 4),
            (3.0, nothing.eps + 3 * (whole.eps - nothing.eps), 4),
            (1.0, whole.eps, 2),
        ):
            calls = record_calls(made)
            prediction = made.guided_denoise(condition, SamplingOptions(guidance_scale=scale))(x, step)
            torch.testing.assert_close(prediction.eps, expected, rtol=1e-3, atol=1e-3)
            assert [len(x) for x, _, _ in calls] == [size]
    with pytest.raises(LdmError, match="'msk' is not known; legal: sex, age, covariates, mask, text. Did you mean"):
        made.guided_denoise(condition, SamplingOptions(guidance_scale={"msk": 2.0}))
    with pytest.raises(LdmError, match="age is also told by the caption"):
        made.guided_denoise(condition, SamplingOptions(guidance_scale={"age": 2.0}))


def test_a_label_map_file_comes_to_the_models_grid(tmp_path):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    made = conditioned()
    grid = Geometry.plan((6, 4, 4), affine, "RAS", None, (8, 4, 4), 1)
    from ldm.data.preprocessing import Preprocessing

    recipe = Preprocessing(3, "RAS", shape=(8, 4, 4), multiple=(1, 1, 1), channels=("a",), reference=grid)
    stored = np.zeros((6, 4, 4), np.uint8)
    stored[0, 1, 2] = 2
    nib.save(nib.Nifti1Image(stored[::-1].copy(), affine @ np.diag([-1, 1, 1, 1])), tmp_path / "l.nii.gz")
    found = recipe.read_labels(str(tmp_path / "l.nii.gz"))
    assert found.shape == (8, 4, 4)
    assert np.argwhere(found).tolist() == [[1, 1, 2]]  # turned to RAS, padded by one on both sides
    nib.save(nib.Nifti1Image(stored + 0.5, affine), tmp_path / "x.nii.gz")
    with pytest.raises(LdmError, match="x.nii.gz: is not a label map"):
        recipe.read_labels(str(tmp_path / "x.nii.gz"))
    assert made.network.conditioners["mask"].classes.names == ("csf", "grey")


def test_files_from_before_there_were_several_conditioners_load(tmp_path):
    made = model([AGE, SEX], "adaptive_norm")
    made.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        header = json.loads(file.metadata()["ldm"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "conditioners" not in header
    old = {name.replace("conditioners.covariates.", "conditioner."): value for name, value in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "old.safetensors", metadata={"ldm": json.dumps(header)})
    again = LatentDiffusionModel.load(tmp_path / "old.safetensors")
    images = [one.sample({"age": 50.0}, n=1, **OPTIONS).images for one in (made, again)]
    assert (images[0] == images[1]).all()
    parent = torch.nn.ModuleDict({"network": model([AGE, SEX], "adaptive_norm", seed=5).network})
    parent.load_state_dict({n.removeprefix(""): v for n, v in old.items() if n.startswith("network.")})  # a checkpoint
    assert all((parent.state_dict()[n] == v).all() for n, v in tensors.items() if n.startswith("network."))


@pytest.mark.parametrize(("mode", "way"), [("adaptive_norm", "concat"), ("concat", "concat"), ("concat", "spade")])
def test_planes_and_words_are_mapped_by_name(tmp_path, mode, way):
    source = conditioned((SEX, AGE), mode, way=way)
    source.save(tmp_path / "m.safetensors")
    text = {**TEXT, "caption": "adult: a [{age:.0f}-year-old ]{sex:woman|man}"}  # more words
    target = conditioned((VOLUME, SEX, AGE), mode, {"grey": 2, "bone": 5, "csf": 1}, text, seed=5, way=way)
    start_from(target, tmp_path / "m.safetensors")
    labels = np.array([[0, 1, 2, 0] * 2] * 8)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([500])
    for given in ({"mask": [labels], "text": ["a 70-year-old man"]}, {"mask": [None], "text": [""]}):
        with torch.no_grad():
            known, mapped = (
                one.network(x, t, one.encode_condition([{"age": 50.0, "sex": "F"}], given)) for one in (source, target)
            )
        torch.testing.assert_close(mapped, known, rtol=1e-4, atol=1e-4)


def captioned(caption, **settings):
    """A model told by a caption, which names the covariates `age` and `sex`."""
    described = complete(
        {"text": {**TEXT, "caption": caption, "drop_rate": 0.0}}, CovariateSchema([SEX, AGE]), None, ("a",), 1
    )
    return model([SEX, AGE], "adaptive_norm", conditioners=described, **settings)


def translating(**settings):
    image = {"channels": ["a"], "drop_rate": 0.0}
    described = complete({"image": image}, CovariateSchema([AGE]), None, ("a", "b"), 1)
    return model([AGE], "adaptive_norm", conditioners=described, **settings)


def test_what_training_never_hid_has_to_be_given_and_is_not_guided_by():
    made, image = translating(learned_null=False, learned_nulls=["covariates"]), np.zeros((1, 8, 8), np.float32)
    made.sample(image=image, n=2, **OPTIONS)  # without the age, which was hidden
    made.sample({"age": 50.0}, image=image, n=1, guidance_scale={"age": 2.0}, **OPTIONS)
    for inputs in ({}, {"image": [image, None]}):
        with pytest.raises(LdmError, match=r"without its image.*ldm\.conditioners\.image\.drop_rate above 0"):
            made.sample({"age": 50.0}, n=2, **inputs, **OPTIONS)
    for scale in (2.0, {"image": 2.0}):
        with pytest.raises(LdmError, match=r"without its image, which guidance.*ldm\.conditioners\.image\.drop_rate"):
            made.sample({"age": 50.0}, image=image, n=1, guidance_scale=scale, **OPTIONS)
    other = translating(learned_null=False, learned_nulls=["image"])
    other.sample({"age": 50.0}, n=1, guidance_scale={"image": 2.0}, **OPTIONS)
    with pytest.raises(LdmError, match=r"go without age: ask.*ldm\.condition\.drop_rate"):
        other.sample(image=image, n=1, **OPTIONS)


def test_files_that_do_not_name_their_nulls_are_sampled_as_ever():
    translating().sample(n=1, guidance_scale=2.0, **OPTIONS)
    translating(learned_null=False).sample({"age": 50.0}, n=1, **OPTIONS)


@pytest.mark.parametrize(
    ("condition", "rate", "lacking", "learned"),
    [
        ({"mode": "none", "drop_rate": 0.1, "drop_all_rate": 0.0}, 0.0, {}, []),
        ({"mode": "none", "drop_rate": 0.1, "drop_all_rate": 0.1}, 0.0, {}, ["image"]),
        ({"mode": "none", "drop_rate": 0.0, "drop_all_rate": 0.0}, 0.1, {}, ["image"]),
        ({"mode": "concat", "drop_rate": 0.1, "drop_all_rate": 0.0}, 0.0, {}, ["covariates"]),
        ({"mode": "concat", "drop_rate": 0.0, "drop_all_rate": 0.0}, 0.0, {"age"}, ["age"]),
        ({"mode": "concat", "drop_rate": 0.0, "drop_all_rate": 0.1}, 0.0, {}, ["covariates", "image"]),
    ],
)
def test_a_null_is_learned_by_what_hides_its_conditioner(condition, rate, lacking, learned):
    assert learned_nulls(condition, {"image": {"drop_rate": rate}}, lacking) == learned


def test_a_null_is_learned_where_training_images_have_nothing_to_tell():
    made, whole = captioned("a {sex}[ of {age}]"), {"age": 50.0, "sex": "F"}
    for row, found in (({"sex": "M"}, {"age"}), ({"age": 60.0}, {"sex", "text"}), (whole, set())):
        assert lacking(made, made.schema.encode_table([whole, row])) == found


def test_held_out_subjects_without_a_caption_are_refused_before_training():
    made = captioned("a {sex}", learned_null=False, learned_nulls=["covariates"])
    check_nulls(made, made.schema.encode_table([{"sex": "F"}]))
    with pytest.raises(LdmError, match=r"caption cannot do without.*ldm\.conditioners\.text\.drop_rate above 0"):
        check_nulls(made, made.schema.encode_table([{"sex": "F"}, {"age": 50.0}]))
    made.header["learned_nulls"] = ["text"]
    with pytest.raises(LdmError, match=r"lack the covariate 'sex'.*ldm\.condition\.drop_rate"):
        check_nulls(made, made.schema.encode_table([{"sex": "F", "age": 40.0}, {"age": 50.0}]))


def test_a_model_can_go_without_the_covariates_that_training_images_lacked_and_no_others():
    made = model([AGE, SEX], "adaptive_norm", learned_null=False, learned_nulls=["age"])
    made.sample({"sex": "F"}, n=1, guidance_scale={"age": 2.0}, **OPTIONS)
    check_nulls(made, made.schema.encode_table([{"sex": "F"}]))
    with pytest.raises(LdmError, match="go without sex: ask"):
        made.sample(n=1, **OPTIONS)
    with pytest.raises(LdmError, match="without its covariates, which guidance"):
        made.sample({"sex": "F"}, n=1, guidance_scale={"sex": 2.0}, **OPTIONS)
    with pytest.raises(LdmError, match="lack the covariate 'sex'"):
        check_nulls(made, made.schema.encode_table([{"age": 50.0}]))


def test_a_caption_that_training_never_hid_has_to_be_given():
    made = captioned("a {sex}", learned_null=False, learned_nulls=["covariates"])
    made.sample({"sex": "F"}, n=1, **OPTIONS)
    with pytest.raises(LdmError, match=r"without its text.*ldm\.conditioners\.text\.drop_rate above 0"):
        made.sample({"age": 50.0}, n=1, **OPTIONS)
