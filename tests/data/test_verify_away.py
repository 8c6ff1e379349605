"""Storage that does not answer is no damage: its cure would encode good shards again."""

import pytest

from dis_scale.data import maintenance
from dis_scale.process.errors import StorageAway
from dis_scale.storage import retries
from dis_scale.storage.folder import open_folder
from tests.support.faulty_gateway import Gateway
from tests.support.small_latents import make


def test_storage_that_is_away_is_not_reported_as_damage(
    bucket: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.01)
    latents = make(open_folder(bucket), [3, 3])
    gateway.concerns = lambda request: request.path.endswith(".tar")
    gateway.faults = [503] * 100
    with pytest.raises(StorageAway, match=r"00000\d.tar"):
        maintenance.verify(latents, False, lambda *_: None)
    gateway.faults = []
    assert maintenance.verify(latents, False, lambda *_: None) == {}
