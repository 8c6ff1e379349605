"""Secrets of the environment are nowhere: a complete sweep, and a search of everything that it wrote and of the process titles."""

import re
import time
from pathlib import Path

import pytest

from tests.support import stages, sweeps

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED7EXAMPLE1",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+of/the/store0123456789ABCD",
    "MLFLOW_TRACKING_USERNAME": "planted-operator",
    "MLFLOW_TRACKING_PASSWORD": "planted password of MLflow",
    "HF_TOKEN": "hf_plantedPlantedPlanted",
    "RAY_AUTH_TOKEN": "abad1dea" * 8,
}


class Search:
    """The names of places that had a secret, by the secret's variable."""

    def __init__(self) -> None:
        self.secrets = {name: value.encode() for name, value in SECRETS.items()}
        self.searched: set[str] = set()
        self.matches: set[tuple[str, str]] = set()

    def search(self, where: str, data: bytes) -> None:
        self.searched.add(where)
        self.matches |= {(name, where) for name, value in self.secrets.items() if value in data}

    def folder(self, root: Path) -> None:
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name not in self.secrets:
                self.search(str(path), read(path))

    def processes(self) -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            if title := read(path):
                self.search(str(path), title)

    def ray(self, printed: str) -> None:
        """Search the folder of the sweep's Ray, which is named by its port; the token in it counts as a secret from then on."""
        if port := re.search(r"this command started \(http://127\.0\.0\.1:(\d+)\)", printed):
            for token in Path("/tmp").glob(f"dis-scale-ray-*/token-{port[1]}"):
                if value := read(token):
                    self.secrets[token.name] = value
                self.folder(token.parent)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # gone since it was listed


def test_no_secret_is_in_what_a_sweep_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    log, root, search = tmp_path / "printed.log", tmp_path / "store", Search()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    process = sweeps.start(
        str(root), f"tracking.uri={uri}", f"models={stages.ONE_MODEL}", "train.publish_images=[0, 160]", log=log
    )
    try:
        deadline = time.monotonic() + 2 * sweeps.TIMEOUT_S
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            search.ray(log.read_text())
            search.processes()
            time.sleep(3)
    finally:
        if process.poll() is None:
            sweeps.kill_all(process)
    assert process.returncode == 0, log.read_text()
    search.folder(tmp_path)
    assert search.matches == set()
    names = " ".join(search.searched)
    for place in ("printed.log", "mlflow.db", "mlflow-artifacts", "ray.json", "recipe.yaml", "index.html", "/logs/train-dit/",
                  "/ray/session_", "job-driver-", "dashboard", "/cmdline"):  # fmt: skip
        assert place in names, f"nothing was searched in {place}"
    assert len(search.secrets) == len(SECRETS) + 1, "Ray's token was not seen"
