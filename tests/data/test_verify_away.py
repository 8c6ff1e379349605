"""Storage that does not answer, or that refuses access, is no damage: its cure would encode good shards again."""

import errno
from pathlib import Path

import pytest

from dis_scale.data import maintenance
from dis_scale.process.errors import StorageAway, StorageError
from dis_scale.storage.folder import open_folder
from tests.support import store_requests
from tests.support.faulty_gateway import Gateway
from tests.support.small_latents import make


def test_storage_that_is_away_is_not_reported_as_damage(bucket: str, gateway: Gateway) -> None:
    latents = make(open_folder(bucket), [3, 3])
    gateway.concerns = lambda request: request.path.endswith(".tar")
    gateway.faults = [503] * 100
    with pytest.raises(StorageAway, match=r"00000\d.tar"):
        maintenance.verify(latents, fast=False, report=lambda *_: None)
    gateway.faults = []
    assert maintenance.verify(latents, fast=False, report=lambda *_: None) == {}


def test_the_shards_of_a_set_that_is_gone_are_not_reported_as_damaged(tmp_path: Path) -> None:
    """Such as one on a disk that is unmounted meanwhile."""
    latents = make(open_folder(tmp_path), [3, 3])
    latents.delete("000000.tar")
    with pytest.raises(StorageError, match=r"damaged: no manifest.json: the folder is incomplete or was deleted"):
        maintenance.verify(latents, fast=False, report=lambda *_: latents.delete("manifest.json"))


def test_storage_that_refuses_access_is_not_reported_as_damage(tmp_path: Path) -> None:
    latents = make(open_folder(tmp_path), [3, 3])
    with (
        store_requests.failing(PermissionError(errno.EACCES, "Permission denied"), "read", ".tar"),
        pytest.raises(StorageError, match=r"cannot read .*00000\d.tar: permission denied: check the key"),
    ):
        maintenance.verify(latents, fast=False, report=lambda *_: None)
    assert maintenance.verify(latents, fast=False, report=lambda *_: None) == {}
