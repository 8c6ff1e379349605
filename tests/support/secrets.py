"""Secrets planted in the environment of a sweep, and a search for them in everything that it writes and in the process titles."""

import re
from pathlib import Path

from dis_scale.storage.folder import Folder

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED7EXAMPLE1",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+of/the/store0123456789ABCD",
    "MLFLOW_TRACKING_USERNAME": "planted-operator",
    "MLFLOW_TRACKING_PASSWORD": "planted password of MLflow",
    "HF_TOKEN": "hf_plantedPlantedPlanted",
    "RAY_AUTH_TOKEN": "abad1dea" * 8,
}


PLACES = (
    "mlflow.db", "mlflow-artifacts", "ray.json", "recipe.yaml", "index.html", "/logs/train-", "/session_", "job-driver-",
    "dashboard", "/cmdline",
)  # fmt: skip
"""Parts of names, of which each is searched."""


class Search:
    """The names of places that had a secret, by the secret's variable."""

    def __init__(self, secrets: dict[str, str]) -> None:
        self.secrets = {name: value.encode() for name, value in secrets.items()}
        self.searched: set[str] = set()
        self.matches: set[tuple[str, str]] = set()

    def search(self, where: str, data: bytes) -> None:
        self.searched.add(where)
        self.matches |= {(name, where) for name, value in self.secrets.items() if value in data}

    def folder(self, root: Path) -> None:
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name not in self.secrets:
                self.search(str(path), read(path))

    def store(self, folder: Folder) -> None:
        for path in folder.tree():
            self.search(f"{folder}/{path}", folder.read(path))

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

    def assert_none(self) -> None:
        """Assert that there was no secret, and that everything was searched."""
        assert self.matches == set()
        names = " ".join(self.searched)
        assert [place for place in PLACES if place not in names] == [], "not searched"


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # gone since it was listed
