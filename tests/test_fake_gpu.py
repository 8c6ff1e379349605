"""The device path on a machine without a GPU: PyTorch's fake tensors are "on cuda", and mixing devices or types raises.

What they cannot show: values, kernels (the scan runs as `chunked`), and the backward pass, since autograd asks for the device.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dis_scale import diffusion, vae
from dis_scale.data.latents import Micro
from dis_scale.diffusion.generate import generate
from dis_scale.evaluation import inception
from dis_scale.evaluation.features import Extractor
from dis_scale.models import build
from dis_scale.models.cost import price_model
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis import s6
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import Flow, Gaussian, LatentShape, Precision, Sampling, TrainedVae
from dis_scale.recipe.evaluate import FLOW_SAMPLERS, GAUSSIAN_SAMPLERS, STOCHASTIC_SAMPLERS, Sampler
from dis_scale.training import loop
from dis_scale.training.engine import MOMENTS, Engine, Segment
from dis_scale.training.inputs import StepInput, to_device
from tests.support import seeded_inception

SHAPE, CUDA = LatentShape(4, 8), torch.device("cuda")
SETTINGS = {
    "dis": Dis(kind="dis", width=32, depth=2, patch=2),
    "dit": Dit(kind="dit", width=32, depth=2, heads=2, patch=2),
    "diffussm": DiffuSsm(kind="diffussm", width=32, depth=2, state_size=8),
}
FAMILIES = pytest.mark.parametrize("family", SETTINGS)


@pytest.fixture
def fake() -> Iterator[None]:
    """Fake tensors for what is made here, and for the host's real ones."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def to_gpu(net: nn.Module) -> Any:
    """Replace all weights and buffers by fake ones on the GPU."""
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            on_gpu = torch.empty(p.shape, dtype=p.dtype, device=CUDA)
            setattr(module, name, nn.Parameter(on_gpu, p.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA))
    return net


def model_on_gpu(settings: Any, precision: Precision, checkpointing: str = "none") -> Backbone:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = build(settings, SHAPE, 10, scan="chunked", precision=precision, checkpointing=checkpointing)
    to_gpu(model)
    return model


@FAMILIES
@pytest.mark.parametrize(("precision", "checkpointing"), list(product(["fp32", "bf16"], ["none", "block", "every_2", "selective"])))
def test_a_training_step_copies_its_inputs_and_mixes_no_devices(
    fake: None, family: str, precision: Precision, checkpointing: str
) -> None:
    process: Gaussian | Flow = Gaussian(kind="gaussian") if precision == "bf16" else Flow(kind="flow")
    model = model_on_gpu(SETTINGS[family], precision, checkpointing)
    drop = torch.ones(len(model.drop_rates), 3) if model.drop_rates else None
    built = diffusion.build(process, model.shape)
    t_B = built.sample_times(np.random.default_rng(0), 3)
    x_BCHW, noise_BCHW = torch.randn(2, 3, 4, 8, 8)
    host = StepInput(Micro(x_BCHW, torch.arange(3), noise_BCHW), t_B, drop, 1.0)
    micro, t_B, drop, _ = to_device(host, CUDA)
    loss = loop._loss(model, built, micro, t_B, drop)
    assert (loss.device.type, loss.dtype, loss.shape, loss.requires_grad) == ("cuda", torch.float32, (), True)


def test_state_is_filled_averaged_and_stepped_on_the_gpu(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused AdamW reads Adam's step on the device and does not check where it is."""
    monkeypatch.setattr(torch, "equal", lambda a, b: a.device == b.device)  # fake tensors have no values
    flats = [torch.empty(7, device=CUDA), torch.empty(5, device=CUDA)]
    optimizer = torch.optim.AdamW([{"params": [flat]} for flat in flats], fused=True)
    table = [Segment("a", 0, 7, 0, 0), Segment("b", 0, 4, 1, 1)]
    averages = {"ema": [torch.empty_like(flat) for flat in flats]}
    state = Engine(None, optimizer, flats, averages, table, {"a": torch.Size([7]), "b": torch.Size([4])})
    state.fill(lambda kind, name, start, end: torch.zeros(end - start), adam_step=3)
    for flat in flats:
        flat.grad = torch.empty_like(flat)
        assert {name: state.optimizer.state[flat][name].device.type for name in ("step", *MOMENTS)} == dict.fromkeys(
            ("step", *MOMENTS), "cuda"
        )
    optimizer.step()
    state.update_averages({"ema": 0.9})
    assert {part.device.type for kind in state.kinds for part in state.segments(kind).values()} == {"cpu"}


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that leave the GPU, if they were copied to the host: zeros, and 500 as a time."""

    def numpy(x: torch.Tensor) -> np.ndarray:
        assert x.device.type == "cpu", "copied to the host first"
        return np.zeros(x.shape)

    def time(x: torch.Tensor) -> float:
        assert x.device.type == "cpu", "asked of the GPU, which has to end all work for it"
        return 500.0

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    monkeypatch.setattr(torch.Tensor, "__float__", time)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _: 0)


class Waits(TorchDispatchMode):
    """Counts the copies from the host to the GPU."""

    copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.copies += args[0].device.type == "cpu" and out.device.type == "cuda"
        return out


SAMPLERS = [(Gaussian(kind="gaussian"), name) for name in GAUSSIAN_SAMPLERS] + [(Flow(kind="flow"), name) for name in FLOW_SAMPLERS]


@FAMILIES
@pytest.mark.parametrize(("process", "sampler"), SAMPLERS, ids=lambda value: value if isinstance(value, str) else "")
def test_each_sampler_with_guidance(
    on_host: None, fake: None, monkeypatch: pytest.MonkeyPatch, family: str, process: Any, sampler: Sampler
) -> None:
    """In bf16, where types can be mixed too. A step waits for the GPU only to get its noise, if it has some."""
    monkeypatch.setattr("dis_scale.diffusion.generate.check_labels", lambda *_: None)  # fake labels have no values
    model, built, copies = model_on_gpu(SETTINGS[family], "bf16"), diffusion.build(process, SHAPE), []
    for steps in (2, 4):
        sampling = Sampling(sampler=sampler, steps=steps, guidance=1.5, guidance_interval=(200.0, 700.0))
        with Waits() as waits:  # type: ignore[no-untyped-call]
            latents = generate(model, built, [1, 2, 3], range(3), sampling, device=CUDA)
        assert (latents.device.type, latents.dtype, latents.shape) == ("cuda", torch.float32, (3, 4, 8, 8))
        copies.append(waits.copies)
    assert copies[1] - copies[0] == 2 * (sampler in STOCHASTIC_SAMPLERS)


def test_the_vae_encodes_and_decodes(on_host: None) -> None:
    net = vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        kl = vae.DiffusersVae(to_gpu(net).eval())
        assert kl.encode(np.zeros((2, 32, 32, 3), np.uint8)).device.type == "cuda"
        assert kl.decode(torch.empty(2, 4, 8, 8, device=CUDA)).shape == (2, 32, 32, 3)


def test_inceptions_features_come_back_to_the_host(on_host: None) -> None:
    net = inception.Inception(seeded_inception.state())
    with FakeTensorMode(allow_non_fake_inputs=True):
        extractor = Extractor("inception", "", to_gpu(net), CUDA)
        assert extractor(np.zeros((2, 32, 32, 3), np.uint8)).pooled.shape == (2, 2048)


@pytest.mark.parametrize("family", ["dis", "diffussm"])
@pytest.mark.parametrize(("precision", "checkpointing"), list(product(["fp32", "bf16"], ["none", "block"])))
def test_a_gpu_keeps_the_counted_bytes(
    monkeypatch: pytest.MonkeyPatch, family: str, precision: Precision, checkpointing: str
) -> None:
    """Within 10 %. The scan and the convolution keep what Triton's do: their inputs, and B and C in float32.

    Not for DiT: without a GPU its attention keeps all pairs of tokens.
    """
    settings = SETTINGS[family].model_copy(update={"width": 256, "depth": 8})
    counted = price_model(settings, SHAPE, 10).kept_in(precision)
    monkeypatch.setattr(s6, "two_way_scan", lambda f, b, z, **_: _Scan.apply(*f, *b, z))  # type: ignore[no-untyped-call]
    monkeypatch.setattr(s6, "two_way_conv_silu", lambda *inputs, **_: _Conv.apply(*inputs))  # type: ignore[no-untyped-call]
    with FakeTensorMode(allow_non_fake_inputs=True):
        two, four = (_kept_bytes(model_on_gpu(settings, precision, checkpointing), batch) for batch in (2, 4))
    assert (four - two) / 2 == pytest.approx(counted.left_bytes(checkpointing), rel=0.1)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> Any:
        ctx.save_for_backward(*inputs, *[torch.empty_like(inputs[i], dtype=torch.float32) for i in (3, 4, 10, 11)])
        return torch.empty_like(inputs[0])


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0]), torch.empty_like(inputs[0])


def _kept_bytes(model: Backbone, batch: int) -> int:
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    inputs = torch.empty(batch, *(4, 8, 8), device=CUDA), torch.empty(batch, device=CUDA)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*inputs, torch.zeros(batch, dtype=torch.int64, device=CUDA))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
