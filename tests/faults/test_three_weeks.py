"""A sweep of three weeks that nobody watches ends with all results; without any one of the cures it does not, or is torn down."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from dis_scale.recipe import reading
from dis_scale.sweep import state
from pipelines import driver, restarts, silence
from tests.conftest import TINY
from tests.support.three_weeks import DAY, Rules, Weeks

ROOT = Path(__file__).parents[2]


def shipped() -> Rules:
    """The limits of cluster/rayjob.yaml, and that of cluster/kuberay-operator.yaml."""
    spec = next(yaml.safe_load_all((ROOT / "cluster/rayjob.yaml").read_text()))["spec"]
    operator = yaml.safe_load((ROOT / "cluster/kuberay-operator.yaml").read_text())
    environment = {variable["name"]: variable["value"] for variable in operator["env"]}
    timeout_s = environment["RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS"]
    assert operator["metrics"]["serviceMonitor"]["enabled"], "alerts read the operator's metrics"
    (submitter,) = spec["submitterPodTemplate"]["spec"]["containers"]
    follows = "while state=$(ask status $job)" in " ".join(submitter.get("command", []))
    return Rules(spec["backoffLimit"], spec["submitterConfig"]["backoffLimit"], float(timeout_s), follows)


def weeks(root: Path, rules: Rules | None = None) -> Weeks:
    return Weeks(root, reading.load(TINY, ["train.restarts=100", "evaluate.floor=false"]), rules or shipped())


def test_three_weeks_end_with_all_results_and_no_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = weeks(tmp_path)
    made.run(monkeypatch)
    assert (made.deployment, made.why, made.clusters) == ("Complete", "", 1)
    assert made.complete
    assert state.excluded_nodes(made.sweep) == ["node-1"]
    assert made.world.now > 21 * DAY
    happened = made.happened
    assert happened["answer lost"] > 10
    assert happened["head silent"] > 10
    assert (happened["head away"], happened["storage away"], happened["drought"]) == (2, 2, 1)
    assert (happened["encoder killed"], happened["disk full"]) == (1, 1)
    assert happened["GPU failed"] > 5, "also while the node is excluded, and the others are away"
    assert made.encoded_h < 12
    assert happened["submitter lost"] >= 10
    assert happened["log ended"] == 6
    assert happened["preemption"] > 10


def no_answer_is_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(driver, "Silence", partial(silence.Silence, most_s=-1.0))


def no_node_is_avoided(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state, "MOST_NODE_FAILURES", 10**9)


def storage_is_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """Neither within a job, nor by another that follows once storage answers: each alone is enough."""
    patch.setattr(restarts, "STORAGE_AWAY_S", 0.0)
    patch.setattr(driver, "MOST_FOLLOWED", 0)


@pytest.mark.parametrize("cure", [no_answer_is_lost, no_node_is_avoided, storage_is_not_waited_for], ids=lambda cure: cure.__name__)
def test_without_a_cure_of_ours_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cure: Callable[[pytest.MonkeyPatch], None]
) -> None:
    cure(monkeypatch)
    made = weeks(tmp_path)
    made.run(monkeypatch)
    assert not made.complete or made.clusters > 1


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"status_timeout_s": 300.0}, "JobStatusCheckTimeoutExceeded"),
        ({"submitter_limit": 2, "backoff_limit": 0}, "SubmissionFailed"),
        ({"submitter_follows": False, "backoff_limit": 0}, "JobDeploymentStatusTransitionGracePeriodExceeded"),
    ],
    ids=["five minutes for the head", "three losses of the submitter", "the end of the log's connection"],
)
def test_with_a_limit_of_kuberay_as_it_comes_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: dict[str, float], why: str
) -> None:
    made = weeks(tmp_path, replace(shipped(), **rules))  # type: ignore[arg-type]
    made.run(monkeypatch)
    assert (made.deployment, made.why, made.complete) == ("Failed", why, False)


def test_without_a_watch_a_hung_encoder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = weeks(tmp_path)
    made.encoders_hang_after_s = float("inf")
    made.run(monkeypatch)
    assert made.encoded_h > 30, "until the head was lost, and with it the encoder"
