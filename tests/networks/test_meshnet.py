"""MeshNet read from plain files: the same numbers as convolutions written out, and parts as within the whole."""

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from ldm.errors import LdmError
from ldm.networks.meshnet import load_meshnet

NUMPY = {"relu": lambda x: np.maximum(x, 0), "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))}


def layer(channels, out, dilation=1, kernel=3):
    return {
        "in_channels": channels,
        "out_channels": out,
        "kernel_size": kernel,
        "padding": kernel // 2 * dilation,
        "stride": 1,
        "dilation": dilation,
    }


def write_meshnet(path, layers, arrays, **description):
    """The pair ``path`` (.npz) and its list of layers; returns ``path``."""
    np.savez(path, **arrays)
    path.with_suffix(".json").write_text(json.dumps({"bnorm": False, "layers": layers, **description}))
    return path


LAYERS = [layer(1, 4), layer(4, 4, dilation=2), layer(4, 4, dilation=3), layer(4, 3, kernel=1)]


def random_arrays(bias=True):
    """Weights (and biases) of LAYERS, whose names have gaps and are not in order as text."""
    generator, arrays = np.random.default_rng(0), {}
    for number, one in zip((0, 2, 9, 10), LAYERS, strict=True):
        shape = (one["out_channels"], one["in_channels"], *[one["kernel_size"]] * 3)
        arrays[f"model.{number}.weight"] = generator.normal(0, 0.3, shape).astype(np.float32)
        if bias:
            arrays[f"model.{number}.bias"] = generator.normal(0, 0.3, shape[0]).astype(np.float32)
    return arrays


def naive(image, arrays, activation):
    """Scores ``(K, D, H, W)`` of ``(D, H, W)`` by SciPy, with the kernels dilated by zeros."""
    x = image[None]
    for number, one in zip((0, 2, 9, 10), LAYERS, strict=True):
        weight, step = arrays[f"model.{number}.weight"], one["dilation"]
        kernels = np.zeros((*weight.shape[:2], *[(weight.shape[2] - 1) * step + 1] * 3))
        kernels[:, :, ::step, ::step, ::step] = weight
        x = np.stack(
            [
                sum(ndimage.correlate(c, k, mode="constant") for c, k in zip(x, ks, strict=True)) + bias
                for ks, bias in zip(kernels, arrays.get(f"model.{number}.bias", np.zeros(len(kernels))), strict=True)
            ]
        )
        x = x if number == 10 else NUMPY[activation](x)
    return x


@pytest.mark.parametrize(("activation", "bias"), [("relu", True), ("elu", False)])
def test_it_computes_what_convolutions_written_out_give(tmp_path, activation, bias):
    arrays, image = random_arrays(bias), np.random.default_rng(1).normal(size=(9, 8, 7))
    path = write_meshnet(tmp_path / "net.npz", LAYERS, arrays, elu=activation == "elu")
    found = load_meshnet(path)(torch.from_numpy(image).float()[None, None])
    np.testing.assert_allclose(found[0], naive(image, arrays, activation), atol=1e-5)


def test_a_part_is_segmented_as_within_the_whole(tmp_path):
    network = load_meshnet(write_meshnet(tmp_path / "net.npz", LAYERS, random_arrays(), elu=True))
    whole, part, reach = torch.full((1, 1, 34, 34, 34), -0.7), (..., *[slice(8, 26)] * 3), 1 + 2 + 3
    content = torch.randn(1, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    whole[(..., *[slice(8 + reach, 26 - reach)] * 3)] = content
    kept, expected = whole.clone(), network(whole)[part]  # the borders of the whole are further than the network sees
    torch.testing.assert_close(network(whole[part], outside=-0.7), expected, atol=1e-5, rtol=1e-5)
    assert (network(whole[part]) - expected).abs().max() > 0.1
    assert torch.equal(whole, kept)


def test_files_that_are_no_network_are_refused(tmp_path):
    arrays = random_arrays()
    for layers, given, message, description in (
        (LAYERS[:3], arrays, "lists 3 layers, but .*net.npz has weights of 4", {}),
        ([LAYERS[0], layer(4, 4, kernel=1), *LAYERS[2:]], arrays, r"model.2.weight has shape \(4, 4, 3, 3, 3\)", {}),
        (LAYERS, arrays, "legal: networks without normalisation", {"bnorm": True}),
        ([{**LAYERS[0], "padding": 0}, *LAYERS[1:]], arrays, "layer 0 is .* legal: odd kernel_size", {}),
        ([{"in_channels": 1}, *LAYERS[1:]], arrays, "layer 0 is .*kernel_size", {}),
        ([{**LAYERS[0], "in_channels": 2}, *LAYERS[1:]], arrays, "takes 2 channels; legal: 1", {}),
        ([], arrays, "it has to list the convolutions", {}),
        (LAYERS, {"model.0.weight": np.array([{}], object)}, "net.npz cannot be read as the arrays", {}),
    ):
        path = write_meshnet(tmp_path / "net.npz", layers, given, **description)
        with pytest.raises(LdmError, match=message):
            load_meshnet(path)
