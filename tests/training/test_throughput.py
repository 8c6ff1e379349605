"""MFU is model FLOPs over peak FLOPs; rates are those since the last call."""

import pytest
import torch

from dis_scale.models.cost import price_model
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.recipe import LatentShape
from dis_scale.training.throughput import ThroughputMeter, peak_flops
from tests.support.prices import price_of

CPU = torch.device("cpu")


def test_rates_are_of_the_time_since_the_last_call() -> None:
    cost, logged, clock = price_of("DiT-S/2"), list[str](), [100.0]
    meter = ThroughputMeter(cost, 8, 2, CPU, 1e14, "datasheet, bf16", logged.append, lambda: clock[0])
    assert meter.rates(64) == {}, "no step yet"
    meter.begin(64)
    assert meter.rates(64) == {}
    clock[0] += 4.0
    first = meter.rates(64 + 400)
    assert (first["images_per_s"], first["tokens_per_s"]) == (100.0, 25_600.0)
    assert first["mfu"] == pytest.approx(100 * 3 * 2 * 6.056e9 / 2e14, rel=0.01)
    clock[0] += 8.0
    assert meter.rates(64 + 800)["images_per_s"] == 50.0
    assert len(logged) == 1
    assert "100.0 images/s, 25,600 tokens/s, MFU 1.8% of 2 x 100 TFLOP/s (datasheet, bf16)" in logged[0]


def test_kernels_of_a_micro_batch_are_shared_by_its_images() -> None:
    price = price_model(DiffuSsm(kind="diffussm", width=64, depth=2), LatentShape(4, 16), 10)
    assert price.kernel_gmacs > 0
    assert price.training_flops(1) - price.training_flops(4) == pytest.approx(2e9 * 3 * price.kernel_gmacs * 0.75)


def test_a_device_without_a_datasheet_is_timed() -> None:
    flops, source = peak_flops(CPU, "fp32", "NVIDIA T4")
    assert 1e9 < flops < 1e14
    assert source == "the fastest product of 1024 x 1024, fp32"


@pytest.mark.parametrize("part", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H200 NVL"])
def test_a_part_of_a_gpu_has_not_the_whole_ones_peak(part: str) -> None:
    assert peak_flops(CPU, "fp32", part)[1].startswith("the fastest product")


def test_a_gpus_datasheet_is_found_by_its_name() -> None:
    assert peak_flops(torch.device("cuda"), "bf16", "NVIDIA H200") == (989e12, "datasheet, bf16")
    assert peak_flops(torch.device("cuda"), "fp32", "NVIDIA H200") == (67e12, "datasheet, fp32")
