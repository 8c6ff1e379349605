"""Leases held by another process."""

import psutil

from dis_scale.storage import lease
from dis_scale.storage.folder import Folder
from dis_scale.storage.lease import Holder


def run_elsewhere(folder: Folder) -> None:
    """Let a live process, this one's parent, hold a lease."""
    parent = psutil.Process().parent()
    assert parent
    with lease.hold(folder):
        number = max(name for name in folder.list() if name.isdigit())
        holder = Holder.read(folder, number).changed(pid=parent.pid, started=lease.began(parent.pid))
        holder.write(folder, number)
    folder.delete(f"{number}.end")
