"""A real Slurm of several nodes on this machine: a controller and one daemon per node, with munge, for tests.

apt-get install --no-install-recommends slurm-wlm munge
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from dis_scale.process.machine import free_ports
from tests.support.waiting import wait_until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "scancel")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
KillWait=30
OverTimeLimit=0
ReturnToService=2
MinJobAge=300
FirstJobId=2100
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Return the programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class Slurm:
    """A running Slurm; `environment` is for its clients."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self._daemons = folder, list[subprocess.Popen[bytes]]()
        controller, *ports = free_ports(1 + nodes)
        host = socket.gethostname()
        lines = [
            f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for n, port in enumerate(ports)
        ]
        (folder / "state").mkdir()
        config = CONFIG.format(host=host, controller=controller, folder=folder, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(config)
        active = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as slurm.sh asks for
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": active, "LAST_SCRAPE_S": "1"}
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        folder.chmod(0o755)
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        named = [f"--{option}={folder / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *named)
        wait_until(lambda: (folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for n in range(nodes):
            self._daemon("slurmd", "-D", "-N", f"n{n}", "-f", str(folder / "slurm.conf"))
        wait_until(lambda: self.run("sinfo", "--noheader", "--format=%D %T").strip() == f"{nodes} idle")

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def state(self, job: str) -> str:
        """Return a job's state, for example RUNNING, and its number of restarts."""
        facts = dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", "-o", job).split())
        return f"{facts['JobState']} {facts['Restarts']} {facts['ExitCode']}"

    def stop(self) -> None:
        """Cancel all jobs, wait until their processes have gone, and end the daemons."""
        self.run("scancel", "--full", "--user=root")
        wait_until(lambda: not self.run("squeue", "--noheader"), 90)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(30)

    def _daemon(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}-{len(self._daemons)}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen([program, *arguments], env=getattr(self, "environment", None), stdout=log, stderr=log)
            )
