"""The state that the engine gives to the optimizer."""

import torch

from dis_scale.training.engine import MOMENTS, Engine


def test_the_filled_state_is_on_the_device_of_its_flat() -> None:
    """Fused AdamW reads Adam's step on the device and does not check where it is."""
    flat = torch.empty(4, device="meta")
    optimizer = torch.optim.AdamW([flat], fused=False)
    engine = Engine(deepspeed=None, optimizer=optimizer, flats=[flat], averages={}, table=[], shapes={})
    engine.fill(lambda *_: torch.empty(0), adam_step=3)
    state = optimizer.state[flat]
    assert {name: state[name].device for name in ("step", *MOMENTS)} == dict.fromkeys(("step", *MOMENTS), flat.device)
