"""The scaling between the latents of an autoencoder and those that the backbone sees."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dis_scale.data.maintenance import describe
from dis_scale.process.errors import UserError
from dis_scale.storage.folder import open_folder
from dis_scale.vae import to_pixels
from dis_scale.vae.scaling import Scaling
from tests.support.autoencoders import encode_digits, saved
from tests.support.documents import put_latents


def test_scale_and_shift_by_channel_are_those_of_diffusers_pipelines(tmp_path: Path) -> None:
    """Decoding is `z latents_std / scaling_factor + latents_mean`, as in StableDiffusionXLPipeline."""
    mean, std = [0.1, -0.2, 0.3, 0.4], [2.0, 3.0, 4.0, 5.0]
    settings = saved(tmp_path / "vae", 3, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    decoder, reader = encode_digits(tmp_path, settings)
    moments, _ = reader.read(np.arange(8), np.zeros(8, int))
    scaled = reader.scaling.apply(moments[:, :4].astype(np.float32))
    mean_C11, std_C11 = (np.array(each, np.float32)[:, None, None] for each in (mean, std))
    np.testing.assert_allclose(scaled * std_C11 / 0.5 + mean_C11, moments[:, :4], atol=1e-5)
    plain = to_pixels(decoder.net.decode(torch.from_numpy(moments[:, :4]).float()).sample)
    assert np.abs(decoder.decode(torch.from_numpy(scaled)).astype(int) - plain.astype(int)).max() <= 1
    lines = describe(reader.folder)
    assert any("shift 0.1 -0.2 0.3 0.4" in line for line in lines)
    assert any("scale 0.25 0.167 0.125 0.1 makes" in line for line in lines)


def test_a_constant_channel_is_not_normalised(tmp_path: Path) -> None:
    """The deviation of a constant channel is 0 or, by rounding, nearly."""
    mean, std = (0.0, 1.0, 0.1), (1.0, 0.0, 1.4e-17)
    latents = put_latents(open_folder(tmp_path), mean=mean, std=std, posterior_variance=(0.0, 0.0, 0.0))
    assert Scaling.of(latents, "vae") == Scaling(0.0, 1.0)
    with pytest.raises(UserError, match=r"channels \[1, 2\] of the latents are constant: set it to vae"):
        Scaling.of(latents, "channels")
    noisy = latents.changed(posterior_variance=(0.0, 4.0, 1.0))
    assert Scaling.of(noisy, "channels").scale == [1.0, 0.5, 1.0]
