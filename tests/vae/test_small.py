"""The autoencoder that a sweep trains itself."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.modules.module import register_module_forward_hook

from dis_scale import vae
from dis_scale.planning.first_recipe import SMALL_VAE
from dis_scale.recipe import TrainedVae, reading
from dis_scale.vae import small, to_unit
from tests.conftest import TINY


def test_groups_of_a_trained_autoencoder_divide_its_widths() -> None:
    assert vae.new(TrainedVae(kind="trained", widths=(4, 8), norm_groups=1), 16).config.norm_num_groups == 1
    with pytest.raises(ValueError, match="widths: 12 is not a multiple of norm_groups 8: choose groups that divide it"):
        TrainedVae(kind="trained", widths=(8, 12))


def test_no_two_threads_share_a_layer_and_their_number_is_restored() -> None:
    """Beside one busy core two threads that wait for each other took ten times as long."""
    settings = TrainedVae(kind="trained", widths=(4, 8), norm_groups=1, steps=2, batch_images=4)
    before, seen = torch.get_num_threads(), set[tuple[str, int]]()
    torch.set_num_threads(2)
    note = register_module_forward_hook(lambda *_: seen.add((threading.current_thread().name, torch.get_num_threads())))
    try:
        small.train_vae(settings, drawings(8, 16), 0, lambda _: note.remove())
        assert (len(seen), {threads for _, threads in seen}, torch.get_num_threads()) == (2, {1}, 2)
    finally:
        note.remove()
        torch.set_num_threads(before)


@pytest.mark.slow  # three minutes, on slow cores beside other work more than ten
@pytest.mark.timeout(1800)
def test_the_autoencoder_that_init_chooses_without_a_gpu_keeps_the_colours_of_drawings() -> None:
    """Of any colour: after three fifths of the steps the mean colour of an image is off by 8 of 255."""
    images = drawings(600, 32)
    settings = reading.load(TINY, [f"vae={{kind: trained, {SMALL_VAE}}}"]).vae
    assert isinstance(settings, TrainedVae)
    net = small.train_vae(settings, images, 0, lambda _: None)
    with torch.no_grad():
        decoded = net.decode(net.encode(to_unit(images[:256])).latent_dist.mode()).sample.clamp(-1, 1)
    difference = 127.5 * (decoded - to_unit(images[:256]))
    assert difference.mean((2, 3)).abs().mean() < 4
    assert difference.square().mean().sqrt() < 255 * 10 ** (-24 / 20), "a PSNR of 24 dB"


def drawings(count: int, size: int) -> np.ndarray:
    """Circles, squares and triangles of random colours on light backgrounds, with a line across."""
    rng, images = np.random.default_rng(0), []
    for number in range(count):
        image = Image.new("RGB", (4 * size, 4 * size), tuple(rng.integers(180, 256, 3).tolist()))
        (x, y), r = rng.uniform(0.3, 0.7, 2) * 4 * size, rng.uniform(0.15, 0.35) * 4 * size
        shape = ImageDraw.Draw(image)
        box, points = (x - r, y - r, x + r, y + r), [(x, y - r), (x - r, y + r), (x + r, y + r)]
        draw = (shape.ellipse, shape.rectangle, shape.polygon)[number % 3]
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw(points if number % 3 == 2 else box, fill=colour, outline=(0, 0, 0))
        line = rng.uniform(0, 4 * size, 4).tolist()
        shape.line(line, fill=tuple(rng.integers(0, 256, 3).tolist()), width=size // 5)
        images.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(images)
