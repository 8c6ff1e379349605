"""Drills of storage: full, away, damaged, lost, too dear, of another version."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from dis_scale.sweep import RECIPE as STORED_RECIPE
from dis_scale.sweep import state
from ops.drills.drill import AWAY, DONE, FAILED, MISTAKE, MODEL, STOPPED, Drill, Missing, copy_tree, held, local, require, slowed

SMALL_DISK = "48m"
"""Size of the disk that fills up: what is prepared takes a third of it."""


def damaged_resume_point(drill: Drill) -> None:
    sweep = drill.start(faults=held(640) + slowed(640))
    drill.until_held(sweep)
    sweep.terminate()
    drill.go_on()
    drill.wait(sweep, STOPPED)
    newest = state.point_names(drill.run)[-1]
    folder, name = drill.run.resume_point(newest), "weights-00001.safetensors"
    folder.write(name, flipped(folder.read(name)))
    drill.dis_scale("verify", str(drill.sweep), ends=FAILED)
    drill.expect(f"{newest}/{name}: damaged: .*training uses the resume point before it")
    drill.resume()
    drill.expect(f"resume point passed over: .*{newest}/{name}: damaged: its sha256 differs")


def storage_down(drill: Drill) -> None:
    """A real S3 server is killed: until six requests of training have failed, then while the sweep is stopped."""
    store = drill.object_store()
    sweep = drill.start(faults=held(304) + slowed(320))
    drill.until_held(sweep)
    store.kill()
    drill.go_on()
    store.until_missed(6)
    store.resume()
    drill.until_saved(sweep, 320)
    sweep.terminate()
    drill.wait(sweep, STOPPED)
    store.kill()
    drill.dis_scale("resume", str(drill.sweep), ends=AWAY)
    drill.expect("waiting  storage does not answer.*")
    drill.run_sweep(ends=AWAY)
    drill.expect("error: cannot list .*")
    store.resume()
    drill.resume()


def disk_full(drill: Drill) -> None:
    """Another program's file takes all that is free on a small disk."""
    mount_small_disk(Path(drill.store), drill)
    sweep = drill.start(faults=held(480))
    drill.until_held(sweep)
    ballast = Path(drill.store) / "ballast"
    fill(ballast)
    drill.go_on()
    drill.wait(sweep, FAILED)
    drill.expect("no space left on the device: free some, then run the same command again")
    ballast.unlink()
    drill.resume()


def mount_small_disk(folder: Path, drill: Drill) -> None:
    """Put the content of a folder on a disk of its own."""
    if os.geteuid():
        raise Missing("root, to mount a disk")
    moved = folder.rename(folder.with_name("moved"))
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "drill", str(folder)], check=True)
    drill.ends.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    shutil.copytree(moved, folder, dirs_exist_ok=True)


def fill(file: Path) -> None:
    """Write to a file until its disk is full."""
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(2**16))
        except OSError:
            pass


def roll_back(drill: Drill) -> None:
    """A sweep in a bucket."""
    theirs = local(drill.undisturbed)
    drill.object_store()
    for made in ("runs", "evaluation"):
        copy_tree(theirs / made, drill.sweep.folder / made)
    drill.sweep.folder.write(STORED_RECIPE, (theirs / STORED_RECIPE).read_bytes())
    drill.dis_scale("fork", str(drill.sweep), MODEL, "--at", "2880", "--as", "dit-again")
    drill.expect("forked .*: continues from 2880 images")
    drill.resume()
    drill.expect("dit-again: attempt 1, 2 workers, from 000000002880-0000")
    drill.require_same_weights("dit-again")


def mlflow_database_lost(drill: Drill) -> None:
    """The database is deleted while training writes to it."""
    database = Path(drill.store) / "mlflow.db"
    sweep = drill.start(faults=held(320))
    drill.until_held(sweep)
    for file in database.parent.glob(f"{database.name}*"):
        file.unlink()
    drill.go_on()
    drill.wait(sweep, DONE)
    drill.expect("MLflow cannot be reached, rows wait in storage: sqlite:.* is gone")
    assert not database.exists()
    drill.dis_scale("mlflow", "sync", str(drill.sweep))
    drill.expect(r"[1-9][\d,]* rows of training and all evaluations are in sqlite:")


def cost_out_of_hand(drill: Drill) -> None:
    sweep = drill.start(faults=held(480) + slowed(480))
    drill.until_held(sweep)
    drill.dis_scale("status", str(drill.sweep))
    drill.expect("training")
    drill.dis_scale("stop", str(drill.sweep))
    drill.expect("stop requested: ")
    drill.go_on()
    drill.wait(sweep, STOPPED)
    drill.dis_scale("status", str(drill.sweep))
    drill.expect("stopped: the last sweep command ended")
    drill.resume()
    drill.dis_scale("gc", str(drill.sweep))
    drill.expect("total .*; to delete them: dis-scale gc .* --yes")
    drill.dis_scale("gc", str(drill.sweep), "--yes")
    drill.expect("deleted ")
    drill.dis_scale("verify", str(drill.sweep))


def upgrade_in_mid_sweep(drill: Drill) -> None:
    """Simulated: only one PyTorch is installed, so unfinished latents get the version of another one, then complete ones."""
    (name,) = drill.sweep.store.folders("latents")
    latents = drill.sweep.store / "latents" / name
    begun, sealed = latents.read("begun.json"), latents.read("manifest.json")
    for unfinished in (latents / "manifest.json", latents / "000001.json", drill.sweep.folder / "latents.json"):
        unfinished.delete()
    latents.write("begun.json", as_of_another_torch(begun))
    drill.run_sweep(ends=MISTAKE)
    drill.expect("begun with torch '2.0.0', now .*: finish it as it was begun, or delete it, or use another root")
    latents.write("begun.json", begun)  # the version of before finishes the set
    sweep = drill.start(faults=held(320) + slowed(320))
    drill.until_held(sweep)
    sweep.terminate()
    drill.go_on()
    drill.wait(sweep, STOPPED)
    require(latents.read("manifest.json") == sealed, "the finished latents differ from the undisturbed sweep's")
    latents.write("begun.json", as_of_another_torch(begun))
    drill.resume()


def as_of_another_torch(facts: bytes) -> bytes:
    return re.sub(rb'("torch": )"[^"]+"', rb'\1"2.0.0"', facts)


def flipped(data: bytes) -> bytes:
    """Return the same bytes with one bit of the last one flipped."""
    return data[:-1] + bytes([data[-1] ^ 1])
