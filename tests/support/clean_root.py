"""Run the steps of cluster/Dockerfile in order in a clean root, for machines without a container engine. Needs root.

    debootstrap --variant=minbase --include=ca-certificates bookworm ROOT
    python -m tests.support.clean_root ROOT [NAME=VALUE of a build argument ...]

Debian 12 takes the place of the base image: what that has more (CUDA's variables) is not shown. PIP_* variables are passed on.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXPANDED = re.compile(r"\$\{(\w+)\}")


def steps() -> list[tuple[str, str]]:
    """Return (instruction, arguments) of the Dockerfile, its continued lines joined."""
    lines = [line for line in (ROOT / "cluster/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def main(root: Path, given: dict[str, str]) -> None:
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    folder, user, shell = "/", "0", ["/bin/sh", "-c"]
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    for word, rest in steps():
        began_s = time.monotonic()
        match word:
            case "ARG":
                name, _, value = rest.partition("=")
                environment[name] = given.get(name, value)
            case "ENV":
                name, _, value = rest.partition("=")
                environment[name] = EXPANDED.sub(lambda found: environment.get(found[1], ""), value)
            case "SHELL":
                shell = [part.strip('" ') for part in rest.strip("[]").split(",")]
            case "WORKDIR":
                folder = rest
                (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                user = rest
            case "COPY":
                *sources, target = rest.split()
                _copy(sources, root / folder.lstrip("/") / target)
            case "RUN":
                run(root, folder, user, environment, [*shell, rest])
        print(f"{time.monotonic() - began_s:7.1f} s  {word} {rest[:100]}", flush=True)
    check = "id -u; g++ --version; python -m dis_scale plan configs/digits.yaml; ray --version; mlflow --version"
    run(root, folder, user, environment, ["/bin/bash", "-lc", check])


def run(root: Path, folder: str, user: str, environment: dict[str, str], command: list[str]) -> None:
    """Run a command in the root, as the image's user; CalledProcessError if it fails."""
    inner = f"export HOME=$(getent passwd {user} | cut -d: -f6); cd {shlex.quote(folder)} && exec {shlex.join(command)}"
    processes = ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={root}/proc"]
    inside = ["chroot", f"--userspec={user}:{user}", str(root), "/bin/sh", "-c", inner]
    subprocess.run([*processes, *inside], env=environment, check=True)


def _copy(sources: list[str], target: Path) -> None:
    """Copy a folder's content to the target, files into it."""
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:]))
