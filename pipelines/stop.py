"""The stop request of another process: to the sweep's command through storage, and to the jobs through Ray. Needs no PyTorch."""

from dis_scale.process.errors import UserError
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, command_lease
from pipelines import jobs, last_ray
from pipelines.cluster import ray_address
from pipelines.silence import Unanswered


def stop_sweep(url: str, address: str | None) -> list[str]:
    """Request the command that runs a sweep to stop, wherever it runs, and its jobs if their Ray is known; return their names.

    A command that was killed may have left only its jobs. UserError if there is no sweep, or if no live command runs it and its Ray
    does not answer.
    """
    folder = open_folder(url)
    last = lease.last_holding(command_lease(folder))
    command = lease.request_stop(command_lease(folder))
    asked = [f"process {command.holder}"] if command else []
    dead = command is not None and not command.works(folder.time_s())
    try:
        sweep = Sweep.open(url)
        own = address is None and ray_address() is None
        try:
            return asked + jobs.stop_all(sweep, last_ray.address_of(sweep) if own else address)
        except jobs.NoRay:
            if own and last and last.end:
                return asked  # its Ray ended with it
            raise
    except Unanswered as error:
        raise Unanswered(f"{error}; a request was left for {asked[0]}" if asked else str(error)) from error
    except UserError as error:
        if dead:
            raise UserError(f"{error}; a request was left for {asked[0]}, of which no heartbeat came lately") from error
        if not asked:
            raise
        return asked
