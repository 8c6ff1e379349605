"""The lock file has exactly the packages of constraints.txt, with hashes; an audit that could not be done does not pass for one."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.stand_ins import stand_in

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "cluster/requirements.lock").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
UNREACHABLE = "ERROR:pip_audit._cli:zipp: Dependency not found on PyPI and could not be audited: zipp (4.1.2)"


def versions(text: str) -> dict[str, str]:
    """Return the version of each package, by its normalised name."""
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def test_the_lock_file_agrees_with_the_constraints() -> None:
    locked, constrained = versions(LOCK), versions(CONSTRAINTS)
    assert len(locked) > 100
    differing = {n for n in locked.keys() | constrained.keys() if locked.get(n) != constrained.get(n)}
    assert sorted(differing) == [], "rerun: make lock"


def test_each_package_has_a_hash_and_no_address() -> None:
    pins = [entry for entry in re.split(r"\n(?=[^\s#])", LOCK) if not entry.startswith("#")]
    assert len(pins) == len(versions(LOCK))
    assert [pin for pin in pins if not re.search(r"--hash=sha256:[0-9a-f]{64}", pin)] == []
    assert "://" not in LOCK
    assert "Written by: make lock\n" in LOCK


def test_hosted_checks_install_the_programs_that_any_machine_installs() -> None:
    """Without one of them its tests are skipped."""
    hosted, anywhere = (
        sorted(re.findall(r"--no-install-recommends ((?:[a-z-]+ ?)+)", (ROOT / name).read_text())[0].split())
        for name in (".github/workflows/ci.yaml", ".ci/run")
    )
    assert hosted == anywhere
    assert "prometheus" in hosted


def test_the_image_is_installed_from_the_lock(tmp_path: Path) -> None:
    """Its commands, with a pip that records them: the lock with hashes, and then the package alone; another index has no lock."""
    stand_in(tmp_path, "pip", f'echo "$@" >> {tmp_path}/calls')
    (run,) = re.findall(r"^RUN (if \[ -z .*?\n    fi)$", (ROOT / "cluster/Dockerfile").read_text(), re.MULTILINE | re.DOTALL)
    for index in ("", "https://index"):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX": index}
        subprocess.run(["bash", "-c", "uname() { echo x86_64; }\n" + run], env=environment, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "install --no-cache-dir --require-hashes --requirement requirements.lock",
        "install --no-cache-dir --no-deps --no-build-isolation --editable .",
        "install --no-cache-dir --extra-index-url https://index --editable .[server] --constraint constraints.txt",
    ]


@pytest.mark.parametrize(
    ("output", "status", "succeeds", "words"),
    [
        ("No known vulnerabilities found", 0, True, ""),
        ("Found 2 known vulnerabilities in 1 package", 1, False, "audit: vulnerable packages"),
        (UNREACHABLE, 1, False, "audit: NOT DONE"),
    ],
)
def test_the_audit_tells_its_three_outcomes_apart(tmp_path: Path, output: str, status: int, succeeds: bool, words: str) -> None:
    stand_in(tmp_path, "pip-audit", f"echo '{output}' >&2; exit {status}")
    (tmp_path / "installed").touch()
    done = subprocess.run(["make", "audit", f"SUPPLY={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0, output in done.stdout, words in done.stderr) == (succeeds, True, True), done
