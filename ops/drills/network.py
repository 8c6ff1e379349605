"""Machines as network namespaces on one bridge, each with a link that can be cut: for Ray clusters of several nodes."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

BRIDGE, SUBNET = "ds-bridge", "10.233.77"


def missing() -> str:
    """Return what this machine lacks for namespaces; empty if nothing."""
    return "root and `ip` (apt-get install iproute2)" if os.geteuid() != 0 or shutil.which("ip") is None else ""


def ip(*words: str) -> None:
    """Run the command `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def within(name: str) -> list[str]:
    """Return the command that runs another one in a namespace."""
    return ["ip", "netns", "exec", name]


@contextlib.contextmanager
def linked(names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the address of each namespace; its end of the link is `eth0` inside and has the namespace's name outside."""
    addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, 2)}
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in addresses.items():
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", BRIDGE, "up")
            for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                ip("-n", name, *words)
            ip("-n", name, "link", "set", "lo", "up")
        yield addresses
    finally:
        for name in names:  # the link first: the kernel takes it with the namespace, but later, and the next one has its name
            subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
