"""A worker that says where it is. Imports little: each of its processes imports this module."""

import os

import ray

from pipelines.worker import Worker


class Probe(Worker):
    def where(self) -> tuple[str, list[str]]:
        """Return its node and its GPUs."""
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"]

    def visible(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")
