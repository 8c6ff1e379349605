"""A rank that hangs: the job's log has the stacks of all ranks, and the collective in which the others wait."""

from dataclasses import replace
from pathlib import Path

from dis_scale import faults
from pipelines import jobs
from pipelines.cluster import open_cluster
from tests.support import clusters, stages
from tests.support.clusters import Events


def test_the_collective_in_which_the_others_wait_is_logged(tmp_path: Path) -> None:
    plan = tmp_path / "faults"
    plan.write_text("hang at step rank=1 images=48\n")
    sweep = clusters.sweep_to_train(tmp_path, f"models={stages.ONE_MODEL}", "train.hang_after_s=20")
    with open_cluster(sweep.recipe) as cluster:
        faulty = replace(cluster, runtime_env={"env_vars": {faults.VARIABLE: str(plan)}})
        events = Events(job := jobs.submit(faulty, sweep, "train", "dit"))
        events.wait("restart")
        assert clusters.wait_for_end(job) == "SUCCEEDED", job.reason()
        log = cluster.client.get_job_logs(job.id)
    waiting, hanging = log.split("stacks of worker ")[1:3]
    assert "train_model" in waiting
    assert "train_model" in hanging
    assert "gloo:" in waiting.partition("process group 0: ")[2]
    assert "_inject" in hanging
