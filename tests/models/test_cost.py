"""Parameters and multiply-adds against the reference's tables, which were counted on the public code."""

import time

import pytest

from dis_scale.models.cost import Cost, cost
from dis_scale.recipe import DiffuSsm, Dis, Dit, LatentShape, preset

PARAMETERS = {
    "DiS-S368/2": 29_132_752, "DiS-S368/4": 29_115_184, "DiS-S368/8": 29_309_872,
    "DiS-S/2": 31_606_688, "DiS-S/4": 31_588_352, "DiS-S/8": 31_791_488,
    "DiS-B/2": 121_163_552, "DiS-B/4": 121_126_784, "DiS-B/8": 121_532_672,
    "DiS-M/2": 231_414_560, "DiS-M/4": 231_377_792, "DiS-M/8": 231_783_680,
    "DiS-L/2": 407_249_952, "DiS-L/4": 407_200_896, "DiS-L/8": 407_741_952,
    "DiS-H/2": 906_966_560, "DiS-H/4": 906_892_928, "DiS-H/8": 907_704_320,
}  # fmt: skip
PARAMETERS_512 = {
    "DiS-S368/2": 29_415_376, "DiS-S/2": 31_901_600, "DiS-B/2": 121_753_376,
    "DiS-M/2": 232_004_384, "DiS-L/2": 408_036_384, "DiS-H/2": 908_146_208,
}  # fmt: skip
GMACS = {
    "DiS-S368/2": 7.57, "DiS-S/2": 8.19, "DiS-S368/4": 1.94, "DiS-B/2": 30.58, "DiS-B/4": 7.83, "DiS-B/8": 2.15,
    "DiS-M/2": 60.07, "DiS-M/4": 15.38, "DiS-L/2": 104.88, "DiS-L/4": 26.85, "DiS-H/2": 231.69, "DiS-H/4": 59.30,
    "DiT-S/2": 6.056, "DiT-B/2": 23.005, "DiT-L/2": 80.698, "DiT-XL/2": 118.62,
}  # fmt: skip
GMACS_512 = {"DiS-S368/2": 30.1, "DiS-B/2": 121.6, "DiS-M/2": 238.9, "DiS-L/2": 417.1, "DiS-H/2": 921.3}


def cost_of(name: str, size: int = 32, channels: int = 4, num_classes: int | None = 1000) -> Cost:
    kinds = {"dis": Dis, "dit": Dit, "diffussm": DiffuSsm}
    return cost(kinds[preset(name)["kind"]](**preset(name)), LatentShape(channels, size), num_classes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_dis_are_the_public_codes(name):
    assert cost_of(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS_512)
def test_parameters_of_dis_at_512_pixels(name):
    assert cost_of(name, size=64).parameters == PARAMETERS_512[name]


@pytest.mark.parametrize(("name", "millions"), [("S", 32.865), ("B", 130.316), ("L", 457.841), ("XL", 674.835)])
def test_parameters_of_dit_without_its_fixed_table(name, millions):
    assert cost_of(f"DiT-{name}/2").parameters / 1e6 == pytest.approx(millions, abs=5e-4)


@pytest.mark.parametrize("name", GMACS)
def test_forward_gmacs(name):
    assert cost_of(name).gmacs_forward == pytest.approx(GMACS[name], rel=0.005)


def test_forward_gmacs_of_the_smallest_to_the_tables_two_digits():
    assert cost_of("DiS-S368/8").gmacs_forward == pytest.approx(0.53, abs=0.005)


@pytest.mark.parametrize("name", GMACS_512)
def test_forward_gmacs_at_512_pixels(name):
    assert cost_of(name, size=64).gmacs_forward == pytest.approx(GMACS_512[name], rel=0.005)


@pytest.mark.parametrize(
    ("name", "gflops"), [("S368", 0.4316), ("B", 1.8642), ("M", 3.7044), ("L", 6.5792), ("H", 14.7888)]
)
def test_the_papers_own_column(name, gflops):
    assert cost_of(f"DiS-{name}/4", channels=3, num_classes=None).paper_gflops == pytest.approx(gflops, abs=5.1e-5)


def test_shares_of_the_work_of_h():
    parts = {part.name: part.macs for part in cost_of("DiS-H/2").parts}
    shares = {name: 100 * macs / sum(parts.values()) for name, macs in parts.items()}
    for name, share in {
        "in_proj": 51.5,
        "out_proj": 25.7,
        "skip": 12.6,
        "x_proj": 4.3,
        "dt_proj": 3.2,
        "scan": 2.5,
    }.items():
        assert shares[name] == pytest.approx(share, abs=0.1)


def test_the_largest_is_counted_in_under_a_second():
    cost_of("DiS-S/2")
    start = time.perf_counter()
    cost_of("DiS-H/2"), cost_of("DiT-XL/2")
    assert time.perf_counter() - start < 1
