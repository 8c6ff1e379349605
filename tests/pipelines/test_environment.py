"""The variables of a process group: the interface of the node's address, one order of sums, the record of collectives."""

import os
import socket

import psutil
import pytest

from pipelines import environment
from pipelines.environment import INTERFACES, NAMED_FAULTS, RECORDED_COLLECTIVES, REPRODUCIBLE


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*INTERFACES, *RECORDED_COLLECTIVES, *REPRODUCIBLE, *NAMED_FAULTS):
        monkeypatch.setenv(variable, "")  # restored after the test
        monkeypatch.delenv(variable)


def addresses() -> dict[str, str]:
    """The IPv4 addresses of this machine, each with its interface."""
    every = psutil.net_if_addrs().items()
    return {a.address: name for name, owned in every for a in owned if a.family == socket.AF_INET}


def test_each_address_leads_to_its_interface() -> None:
    assert "127.0.0.1" in addresses()
    assert {ip: environment.interface_of(ip) for ip in addresses()} == addresses()
    assert environment.interface_of("192.0.2.255") is None


def test_a_group_uses_the_nodes_interface_and_nccls_own_algorithm() -> None:
    lo = addresses()["127.0.0.1"]
    assert environment.prepare_group("127.0.0.1", "cuda") == f"gloo on {lo}, NCCL on {lo}"
    expected = {
        "GLOO_SOCKET_IFNAME": lo,
        "NCCL_SOCKET_IFNAME": f"={lo}",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }
    assert {variable: os.environ[variable] for variable in expected} == expected
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "NCCL_ALGO" not in os.environ


def test_what_the_node_sets_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert environment.prepare_group("127.0.0.1", "cuda").endswith("NCCL on ib0")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_address_that_no_interface_owns_leaves_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.prepare_group("192.0.2.255", "cpu") == "gloo on its own choice"
    assert not set(INTERFACES) & os.environ.keys()
