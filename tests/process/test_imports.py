"""What a process leaves out of the libraries that it imports."""

import subprocess
import sys

PROGRAM = """
import sys
import torch
from dis_scale.process.imports import adamw
from dis_scale.recipe import TrainedVae
from dis_scale.vae import autoencoders

autoencoders.import_without_others()
net = autoencoders.new(TrainedVae(kind="trained", widths=(8, 8)), 16)
optimizer = adamw()(net.parameters(), 1e-3)
optimizer.zero_grad()
net(torch.zeros(2, 3, 16, 16)).sample.sum().backward()
optimizer.step()
print([name for name in ("torch._dynamo", "sympy", "transformers", "torchvision", "scipy") if sys.modules.get(name)])
import torch._dynamo, torchvision  # are there when they are used
"""


def test_a_small_autoencoder_is_trained_without_what_takes_longest_to_import() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_its_steps_are_those_of_pytorch() -> None:
    import torch

    from dis_scale.process.imports import adamw

    found = []
    for kind in (torch.optim.AdamW, adamw()):
        torch.manual_seed(0)
        net = torch.nn.Linear(5, 3)
        optimizer = kind(net.parameters(), 1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        found.append([net.weight, *(state["exp_avg_sq"] for state in optimizer.state.values())])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
