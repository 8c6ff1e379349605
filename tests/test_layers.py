"""Which part may import which: lower layers never import higher ones, and each heavy dependency is imported in its door only.

Imports are read from the syntax tree, lazy ones included; code in a string does not count. A part is a file or a folder of
dis_scale/; pipelines/ is one part. Each test collects its offenders from all files.
"""

import ast
import graphlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("dis_scale", "pipelines")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
"""All product code, by path."""

LAYERS = [
    "process",
    "scan storage",
    "models",
    "recipe",
    "sweep",
    "diffusion data tracking vae",
    "weights",
    "training evaluation",
    "planning",
    "report upkeep",
    "api pipelines",
    "cli",
]
"""From the lowest to the highest. A part imports only parts of its own layer and of lower ones."""
DOORS = {
    "ray": "pipelines",
    "aiohttp": "pipelines/jobs.py",
    "deepspeed": "dis_scale/training/engine.py",
    "webdataset": "dis_scale/data/shards.py",
    "mlflow": "dis_scale/tracking/mlflow.py",
    "diffusers": "dis_scale/vae/autoencoders.py",
    "torch_fidelity": "dis_scale/evaluation/inception.py dis_scale/evaluation/sets.py",
    "fsspec": "dis_scale/storage",
    "s3fs": "dis_scale/storage/s3.py",
    "botocore": "dis_scale/storage/s3.py",
    "pyarrow": "dis_scale/data/parquet.py",
    "matplotlib": "dis_scale/report/drawing.py dis_scale/report/figures.py dis_scale/api.py",
    "pandas": "dis_scale/api.py",
    "scipy": "dis_scale/report/fits.py dis_scale/report/loss_law.py dis_scale/evaluation",
    "typer": "dis_scale/cli",
    "rich": "dis_scale/planning dis_scale/report dis_scale/upkeep dis_scale/process dis_scale/cli pipelines",
    "packaging": "dis_scale/upkeep/doctor.py",
    "psutil": "dis_scale/data/memory.py dis_scale/storage/lease.py pipelines/environment.py",
    "mamba_ssm": "dis_scale/scan",
    "causal_conv1d": "dis_scale/scan",
    "triton": "dis_scale/scan",
    "tensorboard": "dis_scale/tracking/dashboards.py",
    "wandb": "dis_scale/tracking/dashboards.py",
}
"""Each dependency, and the files or folders that may import it."""
ANYWHERE = {"torch", "numpy", "PIL", "pydantic", "yaml", "safetensors"}
AT_ONCE = ("process", "recipe", "storage", "sweep", "cli")
"""Parts that the command imports before it answers `--help` or a mistake."""
RAY_PRIVATE = ("ray._private", "ray.core", "ray.experimental", "ray.autoscaler._private")
"""Modules of Ray that its API does not promise."""
RAY_DOOR = "pipelines/ray_private.py"
"""The only file that may import them."""
SLOW = {"torch", "deepspeed", "ray", "mlflow", "diffusers"}
"""Packages whose import takes seconds."""
FOLDERS = {
    "sweeps",
    "runs",
    "resume",
    "published",
    "log",
    "logs",
    "lease",
    "leases",
    "evidence",
    "extractors",
    "evaluation",
    "vary",
}
"""Folders of a sweep; only dis_scale/sweep/ builds paths with these names."""
FAMILIES = {
    "dis": r"dis|dis-[a-z]{1,2}|Dis|DiS(-\S*|Block)?",
    "dit": r"dit|dit-[a-z]{1,2}|Dit|[DS]iT(-\S*|Block)?",
    "diffussm": r"diffussm|DiffuSsm|DiffuSSM(-\S*|Block)?|s4d|S4D",
}
"""The built-in families, and the identifiers and strings that name one; prose may."""
NAMING = {
    "dis_scale/models/families.py": "the list of the built-in families",
    "dis_scale/report/published.py": "points of papers, one of which is no family",
}
"""Files outside of the families' rooms that name one, and the reason."""
NAMED_AS_MODULE = {"dis_scale/diffusion/generate.py": "exported pipelines import generate.generate"}
"""Files with a function of the file's own name, and the reason."""
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts.split()}


def imported(source: str) -> set[str]:
    """Return the dotted names that a file imports; `from a import b` gives `a.b`, whether b is a module or not."""
    return _names(ast.walk(ast.parse(source)))


def imported_at_once(source: str) -> set[str]:
    """Return the names that importing a file imports: not those in functions or under TYPE_CHECKING."""
    return _names(_run_on_import(ast.parse(source)))


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run_on_import(child)


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str | None:
    """Return the part that a dotted name belongs to; None for other packages and for `dis_scale` itself."""
    first, *rest = name.split(".")
    if first == "dis_scale":
        return rest[0] if rest and rest[0] in RANK else None
    return first if first == "pipelines" else None


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def used_parts(source: str) -> set[str]:
    """Return the parts that a file imports."""
    return {part for name in imported(source) if (part := part_of(name))}


def climbs(part: str, source: str) -> list[str]:
    """Return the parts of higher layers that a file of `part` imports."""
    return sorted(other for other in used_parts(source) if RANK[other] > RANK[part])


def packages(names: Iterable[str]) -> set[str]:
    """Return the packages of others among dotted names."""
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dis_scale", "pipelines"}


def may_import(path: str, package: str) -> bool:
    return package in ANYWHERE or any(path == door or path.startswith(f"{door}/") for door in DOORS[package].split())


def uses_private(source: str) -> bool:
    """Whether a file imports Ray's insides."""
    return any(f"{name}.".startswith(f"{module}.") for name in imported(source) for module in RAY_PRIVATE)


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return which part imports which others."""
    edges: dict[str, set[str]] = {}
    for path, source in sources.items():
        if part := part_of(module_of(path)):
            edges.setdefault(part, set()).update(used_parts(source) - {part})
    return edges


def loaded_by(path: str) -> set[str]:
    """Return the other packages that importing a file loads, directly or through files of ours."""
    modules = {module_of(other): other for other in SOURCES}
    packages_loaded, seen, left = set[str](), set[str](), [path]
    while left:
        if (current := left.pop()) in seen:
            continue
        seen.add(current)
        names = imported_at_once(SOURCES[current])
        packages_loaded |= packages(names)
        for parts in (name.split(".") for name in names):
            prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            left += [modules[prefix] for prefix in prefixes & modules.keys()]
    return packages_loaded


def spelt_paths(source: str) -> list[str]:
    """Return the strings joined to a folder with `/` that name a folder of a sweep."""
    joins = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)]
    constants = [c.value for join in joins for c in ast.walk(join.right) if isinstance(c, ast.Constant)]
    return [text for text in constants if isinstance(text, str) and FOLDERS & set(text.split("/"))]


def named_families(source: str) -> set[str]:
    """Return the families that a file's identifiers, imports and strings name; a sentence or a docstring does not count."""
    nodes = list(ast.walk(ast.parse(source)))
    words = {getattr(node, field) for node in nodes for field in ("id", "attr", "name") if hasattr(node, field)}
    words |= {node.value for node in nodes if isinstance(node, ast.Constant)}
    words |= {part for name in _names(nodes) for part in name.split(".")}
    return {
        family
        for family, names in FAMILIES.items()
        for word in words
        if isinstance(word, str) and len(word.split()) == 1 and re.fullmatch(names, word)
    }


def room_of(path: str) -> set[str]:
    """Return the family to whose room a file belongs, if any."""
    return {family for family in FAMILIES if path.startswith(f"dis_scale/models/{family}/")}


def test_the_table_names_every_part() -> None:
    parts = {path.stem for path in (ROOT / "dis_scale").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} | {"pipelines"} == RANK.keys()


def test_lower_layers_never_import_higher_ones() -> None:
    parts = {path: part_of(module_of(path)) for path in SOURCES}
    found = {path: climbs(part, SOURCES[path]) for path, part in parts.items() if part}
    assert {path: higher for path, higher in found.items() if higher} == {}


def test_the_graph_of_parts_has_no_cycle() -> None:
    graphlib.TopologicalSorter(graph(SOURCES)).prepare()


def test_only_the_command_imports_pipelines() -> None:
    importing = {part_of(module_of(path)) for path, source in SOURCES.items() if "pipelines" in used_parts(source)}
    assert importing == {"pipelines", "cli"}


def test_every_dependency_has_a_door() -> None:
    used = {package for source in SOURCES.values() for package in packages(imported(source))}
    assert used - ANYWHERE - DOORS.keys() == set(), "a new dependency: give it a door, or add it to ANYWHERE"


def test_heavy_dependencies_are_imported_in_their_doors_only() -> None:
    used = [(path, package) for path, source in SOURCES.items() for package in sorted(packages(imported(source)))]
    assert [(path, package) for path, package in used if not may_import(path, package)] == []


def test_what_ray_does_not_promise_is_used_in_one_file() -> None:
    using = {path for path, source in SOURCES.items() if uses_private(source)}
    assert using == {RAY_DOOR}


def test_the_command_answers_before_any_slow_import() -> None:
    light = [path for path in SOURCES if part_of(module_of(path)) in AT_ONCE]
    assert len(light) > len(AT_ONCE)
    assert {path: slow for path in light if (slow := loaded_by(path) & SLOW)} == {}


def test_reading_a_recipe_costs_no_heavy_import() -> None:
    reading = [source for path, source in SOURCES.items() if path.startswith("dis_scale/recipe/")]
    assert {package for source in reading for package in packages(imported(source))} == {"pydantic", "yaml"}


def test_paths_below_a_sweep_are_spelt_in_one_place() -> None:
    elsewhere = {path: source for path, source in SOURCES.items() if not path.startswith("dis_scale/sweep/")}
    assert {path: texts for path, source in elsewhere.items() if (texts := spelt_paths(source))} == {}


def test_no_file_names_a_family_outside_of_its_room() -> None:
    named = {path: named_families(source) - room_of(path) for path, source in SOURCES.items()}
    assert {path for path, families in named.items() if families} == NAMING.keys(), named


def test_no_two_classes_share_a_name() -> None:
    names = Counter(n.name for s in SOURCES.values() for n in ast.parse(s).body if isinstance(n, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_function_has_its_modules_name() -> None:
    named = [
        path
        for path, source in SOURCES.items()
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == module_of(path).rpartition(".")[2]
    ]
    assert sorted(named) == sorted(NAMED_AS_MODULE)


@pytest.mark.parametrize(
    ("detect", "source", "found"),
    [
        (partial(climbs, "data"), "from dis_scale import weights", ["weights"]),
        (partial(climbs, "data"), "def f():\n    from dis_scale.training.loop import train_model", ["training"]),
        (partial(climbs, "report"), "import pipelines.jobs", ["pipelines"]),
        (partial(climbs, "training"), "from dis_scale.data.latents import Latents", []),
        (partial(climbs, "models"), "CODE = 'from dis_scale import cli'", []),
        (imported_at_once, "import torch\ndef f():\n    import ray", {"torch"}),
        (imported_at_once, "if TYPE_CHECKING:\n    import torch", set()),
        (imported_at_once, "try:\n    import torch\nexcept ImportError:\n    pass", {"torch"}),
        (uses_private, "from ray._private import state", True),
        (uses_private, "def f():\n    import ray.core.generated.x", True),
        (uses_private, "import ray\nfrom ray.util.metrics import Counter\nfrom ray.experimentals import x", False),
        (spelt_paths, "sweep.folder / 'runs' / model", ["runs"]),
        (spelt_paths, "sweep.folder / f'evaluation/{model}'", ["evaluation/"]),
        (spelt_paths, "sweep.run(model).resume / 'manifest.json'", []),
        (spelt_paths, "print('runs')", []),
        (named_families, "if settings.kind == 'dit': pass", {"dit"}),
        (named_families, "from dis_scale.models.diffussm.network import x", {"diffussm"}),
        (named_families, "isinstance(model, models.DiS)", {"dis"}),
        (named_families, "PRESET = 'DiT-XL/2'", {"dit"}),
        (named_families, '"""DiT\'s convention."""\nprint("as in DiS and DiT")', set()),
    ],
)
def test_the_rules_detect_what_breaks_them(detect: Callable[[str], object], source: str, found: object) -> None:
    assert detect(source) == found


def test_a_cycle_is_detected() -> None:
    cycle = {"dis_scale/data/x.py": "import dis_scale.vae", "dis_scale/vae.py": "def f():\n    import dis_scale.data.x"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph(cycle)).prepare()


@pytest.mark.parametrize(
    ("path", "allowed"), [("pipelines/jobs.py", True), ("dis_scale/sweep.py", False), ("pipelines_old.py", False)]
)
def test_a_door_is_a_file_or_a_folder(path: str, allowed: bool) -> None:
    assert may_import(path, "ray") == allowed
