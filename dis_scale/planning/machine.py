"""What training can use on this machine."""

import os

from dis_scale.data.memory import free_memory_bytes
from dis_scale.planning.first_recipe import Machine
from dis_scale.training.devices import smallest_gpu_bytes, usable_gpus


def this_machine() -> Machine:
    """Return what training can use on this machine."""
    cores, memory, (gpus, _) = len(os.sched_getaffinity(0)), free_memory_bytes(), usable_gpus()
    if not gpus:
        return Machine(cores, memory)
    import torch

    return Machine(cores, memory, gpus, smallest_gpu_bytes(), torch.cuda.get_device_name(0))
