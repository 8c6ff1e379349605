"""World sizes: an attempt has the largest one of the recipe for which the nodes have capacity. Ranks: ordered by node and GPU."""

from dis_scale.recipe import reading
from pipelines.train import Place, largest_fitting, rank_order
from pipelines.waiting import capacity
from tests.conftest import TINY


def test_an_attempt_uses_as_many_workers_as_fit() -> None:
    sizes = reading.load(TINY, ["train.lanes=8", "train.workers=2..6"]).train.world_sizes
    assert sizes == [6, 5, 4, 3, 2]
    bundle = {"CPU": 1, "train": 1.0}
    fitting = [largest_fitting(sizes, capacity(bundle, [{"CPU": cpus, "train": 8}])) for cpus in (9, 5, 3, 1)]
    assert fitting == [6, 5, 3, 0]
    assert capacity(bundle, [{"CPU": 8.0}]) == 0


def test_one_workers_resources_are_on_one_node() -> None:
    bundle = {"CPU": 2, "train": 1.0}
    assert capacity(bundle, [{"CPU": 3, "train": 2}, {"CPU": 1, "train": 1}, {"CPU": 4, "train": 1}]) == 2


def test_ranks_are_in_the_order_of_nodes_and_gpus() -> None:
    places = [
        Place("10.0.0.2", "b", ["0"], 1, ""), Place("10.0.0.1", "c", ["1"], 2, ""), Place("10.0.0.1", "c", ["0"], 9, ""),
        Place("10.0.0.1", "a", ["3"], 4, ""),
    ]  # fmt: skip
    assert rank_order(places) == [3, 2, 1, 0]
    assert [places[::-1][n] for n in rank_order(places[::-1])] == [places[n] for n in rank_order(places)]
