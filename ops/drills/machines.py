"""Drills of processes, nodes and networks that fail, and of clusters."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psutil

from dis_scale.storage.folder import open_folder
from ops.drills import network
from ops.drills.drill import AWAY, DONE, FAILED, GO_ON, HELD, STOPPED, TIMEOUT_S, Drill, Missing, held, slowed
from ops.drills.network import ip, within
from ops.drills.nodes import Node, RayNodes, wait_for_nodes
from ops.drills.processes import kill_all

SLOT = '--resources={"train": 1}'
"""Option of a node that trains with one worker, in a cluster whose other nodes do not."""
TRIES = 5
NAMES = ("ds-head", "ds-one", "ds-two")
"""Machines of the drill that cuts a link."""


def preempted_sweep(drill: Drill) -> None:
    """A rank is killed, then the command is asked to stop."""
    sweep = drill.start(faults=held(480) + held(800) + slowed(800))
    drill.until_held(sweep)
    os.kill(drill.pid_of_rank(sweep, 1), signal.SIGKILL)
    drill.until_logged(sweep, "attempt 2, 2 workers")
    drill.until_held(sweep, 1)
    sweep.terminate()
    drill.go_on()
    drill.wait(sweep, STOPPED)
    drill.expect("a worker was lost .*; restart from the stored state in")
    drill.expect("stopped as requested; to continue: dis-scale resume")
    drill.resume()


def loss_not_finite(drill: Drill) -> None:
    """Simulated: a fault multiplies one rank's gradient by NaN."""
    drill.run_sweep("train.skips_in_a_row=3", faults="nan at loss rank=1 images=480 times=6", ends=FAILED)
    drill.expect("the gradient was not finite in 3 steps in a row")
    dump = re.search(r"losses and weights are in (\S+/\d{12}-\d{4})", drill.output)
    assert dump is not None
    print(f"    {dump[1].replace(str(drill.root), 'ROOT')}: {', '.join(open_folder(dump[1]).list())}")
    drill.resume()


def stuck_job(drill: Drill) -> None:
    """A rank's process is suspended."""
    sweep = drill.start("train.hang_after_s=30", faults=slowed(480, until=GO_ON))
    drill.until_held(sweep)
    os.kill(drill.pid_of_rank(sweep, 1), signal.SIGSTOP)
    drill.go_on()
    drill.wait(sweep, DONE)
    drill.expect(r"no step ended for \d+ s: hanging")
    drill.expect("failure noticed .* first new step")
    drill.dis_scale("logs", str(drill.sweep), "dit")
    drill.expect("stacks of worker 0:")
    drill.expect("no answer: the process is gone or does not run")
    drill.expect("process group 0: ")


def another_cluster(drill: Drill) -> None:
    """Two clusters of two nodes each."""
    plan = drill.plan(held(480) + slowed(480))
    old, new = drill.cluster(cpus=1, DIS_SCALE_FAULTS=plan), drill.cluster(cpus=1)
    join(old, DIS_SCALE_FAULTS=plan)
    join(new)
    drill.use(old)
    first = drill.start()
    drill.until_held(first)
    drill.use(new)
    drill.resume(ends=HELD)
    drill.expect(f"held by process {first.pid} on .*, which is alive: one writer at a time")
    drill.dis_scale("stop", str(drill.sweep))
    drill.expect(f"stop requested: process {first.pid} on ")
    drill.go_on()
    drill.wait(first, STOPPED)
    drill.resume()


def join(nodes: RayNodes, *options: str, cpus: int = 1, **environment: str) -> Node:
    """Start one more node and wait until it is up."""
    node = nodes.node(cpus, options=options, **environment)
    wait_for_nodes(nodes, sum(each.poll() is None for each in nodes.nodes), node)
    return node


def bad_gpu_or_node(drill: Drill) -> None:
    """Simulated: on one of three nodes each check of the device reports an uncorrectable memory error."""
    plan = drill.plan(f"broken at check\nwait at check until={GO_ON}\nbroken at check times=99\n")
    nodes = drill.cluster(cpus=2, options=[SLOT])
    join(nodes, SLOT, "--node-name=bad", DIS_SCALE_FAULTS=plan)
    sweep = drill.start()
    drill.until_logged(sweep, "node bad: failure 1 of its devices")
    join(nodes, SLOT)  # a node takes longer to start than attempts do to fail
    drill.go_on()
    drill.wait(sweep, DONE)
    drill.expect("node bad: failure 2 of its devices: .*uncorrectable ECC error")
    drill.expect("node bad is excluded after 2 failures: drain it, or repair it")
    drill.dis_scale("status", str(drill.sweep))
    drill.expect("bad: excluded after failures of its devices; see ops/runbooks/bad-gpu-or-node.md")
    drill.dis_scale("node", "forgive", str(drill.sweep), "bad")
    drill.expect("forgiven bad: [0-9]+ failures of its devices")


def pods_pending(drill: Drill) -> None:
    """A cluster that has a node for one of two workers. A sweep that waits can be stopped."""
    nodes = drill.cluster(cpus=2, options=[SLOT])
    stopped = drill.start()
    drill.until_logged(stopped, "waiting for capacity for 2 workers.*; the nodes hold 1 of them, so they wait until one joins")
    drill.dis_scale("stop", str(drill.sweep))
    drill.expect(f"stop requested: process {stopped.pid} on ")
    drill.wait(stopped, STOPPED)
    sweep = drill.start()
    drill.until_logged(sweep, "waiting for capacity for 2 workers")
    join(nodes, SLOT)
    drill.wait(sweep, DONE)


def out_of_memory(drill: Drill) -> None:
    """A node with 2 GiB left below the limit at which Ray's own monitor kills workers. A GPU's memory is not exercised.

    That is enough for the probe of the shared folder, and too little for training, whose workers and drivers need twice as much.
    """
    slots = '--resources={"train": 2}'
    nodes = drill.cluster(cpus=2, options=['--resources={"evaluate": 1}'])
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + 2 * 2**30) / memory.total
    small = join(nodes, slots, cpus=2, RAY_memory_usage_threshold=f"{limit:.4f}")
    with using_what_others_free(memory.available):
        sweep = drill.start("train.restarts=1")
        for _ in range(TRIES - 1):  # what other programs take kills the probe too: the command says to run it again
            if sweep.wait(TIMEOUT_S) != AWAY:
                break
            sweep = drill.start("train.restarts=1")
        drill.wait(sweep, FAILED)
    drill.expect("a worker was lost .*low on memory")
    kill_all(small)
    join(nodes, slots, cpus=2)
    drill.resume()


@contextmanager
def using_what_others_free(available: int) -> Iterator[None]:
    """Let no more memory than this, without what the drill itself takes, become available while other programs, as tests, end."""
    ended, held, before = threading.Event(), list[bytes](), _own_memory()

    def hold() -> None:
        while not ended.wait(0.5):
            if (more := psutil.virtual_memory().available - available + _own_memory() - before) > 2**28:
                held.append(b"\1" * (more - 2**27))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        try:
            yield
        finally:
            ended.set()


def _own_memory() -> int:
    """Bytes of the processes that this one has started, without what they share."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total


def nccl_or_network(drill: Drill) -> None:
    """Three machines as network namespaces. The link of one is cut; its node is started again when the link is back."""
    if missing := network.missing():
        raise Missing(missing)
    head, one, two = NAMES
    links = drill.ends.enter_context(network.linked(NAMES))
    nodes = drill.cluster(cpus=2, ip=links[head], within=within(head), options=['--resources={"evaluate": 1}'])
    drill.within = within(head)
    plan = drill.plan(slowed(480, until=GO_ON))

    def start_node(name: str, count: int) -> Node:
        options = [SLOT, f"--node-name={name}"]
        node = nodes.node(1, links[name], within(name), options=options, DIS_SCALE_FAULTS=plan)
        wait_for_nodes(nodes, count, node, within(head))  # one by one: they share a folder, unlike machines
        return node

    start_node(one, 2)
    cut = start_node(two, 3)
    sweep = drill.start("train.hang_after_s=30")
    drill.until_held(sweep)
    ip("link", "set", two, "down")
    drill.go_on()
    drill.until_logged(sweep, "restart from the stored state")
    ip("link", "set", two, "up")
    kill_all(cut)
    start_node(two, 3)
    drill.wait(sweep, DONE)
    drill.expect("; restart from the stored state in")
    drill.expect(f"rank.* on node {two}: ")
    drill.expect("failure noticed .* first new step")
