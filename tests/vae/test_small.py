"""The autoencoder that a sweep trains itself."""

import pytest

from dis_scale import vae
from dis_scale.recipe import TrainedVae


def test_groups_of_a_trained_autoencoder_divide_its_widths() -> None:
    assert vae.new(TrainedVae(kind="trained", widths=(4, 8), norm_groups=1), 16).config.norm_num_groups == 1
    with pytest.raises(ValueError, match="widths: 12 is not a multiple of norm_groups 8: choose groups that divide it"):
        TrainedVae(kind="trained", widths=(8, 12))
