"""A family from a wheel of its own, beside ours: planned, swept against dis-xs in one figure, resumed, and refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dis_scale.storage.folder import open_folder
from tests.support import wheels

ROOT = Path(__file__).parents[2]
RECIPE = """
name: brought
data: {source: {kind: digits}, resolution: 32, num_classes: 10}
vae: {kind: trained, widths: [8, 8, 8], steps: 4, batch_images: 16}
precompute: {shard_images: 450, encode_images: 64}
diffusion: {kind: gaussian}
models:
  dis-xs: {kind: dis, width: 16, depth: 2, patch: 4}
  gated: {kind: gated_conv, width: 16, depth: 2, patch: 4}
train: {publish_images: [0, 160], batch_images: 16, lanes: 4, workers: 2, resume_every_images: 80, zero_stage: 3}
evaluate:
  samples: 80
  sampler: ddim
  steps: 3
  extractor: {kind: trained, name: digits, steps: 20}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.install_gated_conv(tmp_path_factory.mktemp("gated_conv"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "brought.yaml").write_text(RECIPE)
    return tmp_path


def invoke(folder: Path, *words: str, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with the packages of another one beside ours."""
    path = os.pathsep.join(str(each) for each in (ROOT, packages) if each)
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "dis_scale", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def test_a_package_is_planned_and_named_where_it_is_missing(folder: Path, installed: Path) -> None:
    planned = invoke(folder, "plan", "brought.yaml", packages=installed)
    assert "gated_conv" in planned.stdout, planned.stderr
    without = invoke(folder, "plan", "brought.yaml")
    assert (without.returncode, without.stderr.strip()) == (
        2,
        "error: brought.yaml: models.gated.kind: got 'gated_conv', expected one of dis, diffussm, dit",
    )


@pytest.mark.slow
def test_a_package_is_swept_beside_ours(folder: Path, installed: Path) -> None:
    done = invoke(folder, "sweep", "brought.yaml", packages=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = str(folder / "outputs/sweeps/brought")
    for words in (["status", sweep], ["report", sweep], ["compare", sweep, sweep]):
        again = invoke(folder, *words, packages=installed)
        assert again.returncode == 0, again.stderr
    published = f"{sweep}/runs/gated/published/000000000160"
    for words in (["sample", published, "--count", "2", "--out", "grid.png"], ["export", published, "exported"]):
        used = invoke(folder, *words, packages=installed)
        assert used.returncode == 0, used.stderr
    assert "gated" in open_folder(f"{sweep}/report").read("gflops_fid.svg").decode()
    missing = invoke(folder, "status", sweep)
    assert missing.returncode == 2
    assert "need gated-conv 0.1.0, which is not installed on this machine" in missing.stderr


@pytest.mark.slow
def test_a_file_is_swept_and_resumed(folder: Path) -> None:
    """Exactly: tests/models/test_families.py."""
    (folder / "gated_conv.py").write_text((wheels.GATED_CONV / "gated_conv.py").read_text())
    own = "models={gated: {kind: 'gated_conv.py:FAMILY', width: 16, depth: 2, patch: 4}}"
    for images in ("[0, 80]", "[0, 80, 160]"):
        done = invoke(folder, "sweep", "brought.yaml", "--set", own, "--set", f"train.publish_images={images}")
        assert done.returncode == 0, done.stdout + done.stderr
    sweep = folder / "outputs/sweeps/brought"
    assert "gated: attempt 2, 2 workers, from 000000000080-0001" in done.stdout
    assert list((sweep / "runs/gated/published/000000000160").glob("*.safetensors"))
    (folder / "gated_conv.py").unlink()
    refused = invoke(folder, "status", str(sweep))
    assert (refused.returncode, "cannot read gated_conv.py" in refused.stderr) == (2, True)
