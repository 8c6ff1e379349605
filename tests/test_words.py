"""The pages are true: commands, recipes, map, links, the prices of recipes; and no file names a path of one machine.

A test over many commands or files collects its offenders.
"""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from dis_scale.cli.help import EXIT_CODES
from dis_scale.planning.plan import price_sweep
from dis_scale.recipe import LatentShape, NoVae, SourceSettings, VaeSettings, reading
from dis_scale.recipe.evaluate import FLOW_SAMPLERS, GAUSSIAN_SAMPLERS
from docs.reference import settings
from tests.support.pages import (
    DATA,
    PAGES,
    README,
    RESULTS,
    ROOT,
    SNIPPETS,
    blocks,
    failures,
    load,
    require_command,
    require_shape,
    targets,
)

PRICED = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("digits"))
"""Recipes with a table of their price in their first lines; those of the digits have what the plan prints."""
SD_FACTOR = 8
"""Pixels per latent position of Stable Diffusion's autoencoder; its latents have 4 channels."""

TREE = subprocess.run(
    ["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()
FILES = [ROOT / name for name in TREE if (ROOT / name).is_file()]
MACHINE_PATHS = re.compile(rb"(?<![\w.$}])/(?:home|root|work|Users|mnt)/\w")
"""Absolute paths of one machine; the pages write a user's own paths as /data or /shared."""


def commands() -> Iterator[list[str]]:
    """Yield our own commands, without the environment's path and without `ray job submit ... --`."""
    for line in "\n".join(block for page in PAGES for block in blocks(page)).splitlines():
        if command := re.match(r" *(?:\.venv/bin/|ray job submit .* -- )?((?:make|python|dis-scale) .*)", line):
            yield shlex.split(command[1], comments=True)


def sources() -> list[str]:
    """Return each line `source: {...}` in the code of docs/data.md; not those within a recipe."""
    return [line for text in blocks(DATA) for line in re.findall(r"^source: {.*}", text, re.MULTILINE)]


def test_every_source_shown_is_valid() -> None:
    assert sources()
    for line in sources():
        reading.load(ROOT / "configs" / "imagenet256.yaml", [f"data.{line.replace(': ', '=', 1)}"])


def test_the_data_page_names_every_kind_of_source_and_vae() -> None:
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in (*get_args(SourceSettings), *get_args(VaeSettings))}
    assert {kind for kind in kinds if f"| `{kind}` |" not in DATA} == set()


def test_the_table_of_samplers_has_each() -> None:
    page = (ROOT / "docs/sizing.md").read_text()
    for kind, names in {"gaussian": GAUSSIAN_SAMPLERS, "flow": FLOW_SAMPLERS}.items():
        row = re.search(rf"^\| `diffusion: {{kind: {kind}}}` \|(.*?)\|", page, re.MULTILINE)
        assert row
        assert {*re.findall(r"`(\w+)`", row[1])} == {*names}


def test_every_command_shown_exists() -> None:
    assert len(list(commands())) > 20
    assert failures(require_command, commands()) == []


@pytest.mark.parametrize(
    "line",
    ["make nothing", "python -m dis_scale.sweep configs/none.yaml", "dis-scale nothing SWEEP", "dis-scale stop SWEEP dis-m",
     "dis-scale stop SWEEP --nothing", "python -m benchmarks.nothing", "dis-scale plan configs/digits.yaml --set a=1"],
)  # fmt: skip
def test_a_wrong_command_is_detected(line: str) -> None:
    assert len(failures(require_command, [line.split()])) == 1


def test_each_ray_that_a_page_starts_has_a_token() -> None:
    """Without one, all who reach its ports can run programs as its user."""
    pages = [README, *(path.read_text() for path in (ROOT / "docs").glob("*.md")), *RUNBOOKS.values()]
    starting = [block for page in pages for block in blocks(page) if "ray start --head" in block]
    assert len(starting) >= 2
    assert [block for block in starting if "RAY_AUTH_MODE=token" not in block.partition("ray start")[0]] == []


def test_the_two_commands_are_shown_and_ci_runs_the_second() -> None:
    assert {("make", "demo"), ("make", "test")} <= {tuple(words) for words in commands()}
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert {"demo", "test", "lint", "venv"} <= targets()


def test_the_map_is_the_repository() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    (text,) = [block for block in blocks(page) if block.startswith("dis_scale/")]
    outer = {line.split()[0] for line in text.splitlines() if not line.startswith(" ")}
    inner = {line.split()[0] for line in text.splitlines() if line.startswith(" ")}
    assert outer == {shown(name) for name in TREE if not name.startswith(".")}
    mine = {shown(name.removeprefix("dis_scale/")) for name in TREE if name.startswith("dis_scale/")}
    assert inner == mine - {"__init__.py", "py.typed"}


def shown(name: str) -> str:
    """Return a file's first folder with its slash, or the file itself."""
    first, slash, _ = name.partition("/")
    return first + slash


RUNBOOKS = {p.stem: p.read_text() for p in (ROOT / "ops" / "runbooks").glob("*.md") if p.stem != "README"}
INDEX = (ROOT / "ops" / "runbooks" / "README.md").read_text()
OTHERS = ("Ray", "botocore", "NCCL", "PyTorch", "gloo", "Kubernetes", "KubeRay", "CUDA", "the kernel")
"""Programs whose messages the index has, too."""


def test_each_runbook_has_its_drill() -> None:
    from ops.drills.__main__ import DRILLS

    assert DRILLS.keys() == RUNBOOKS.keys()
    assert [name for name, text in RUNBOOKS.items() if f"Drill: `python -m ops.drills {name}`\n" not in text] == []
    assert (ROOT / "ops" / "drills" / "drill.yaml").exists()
    assert "drills" in targets()


def messages() -> Iterator[tuple[str, str, str]]:
    """Yield each message of the index, the program that logs it if it is not ours, and its page."""
    yield from re.findall(r"^\| `(.+?)`(?: \((.+?)\))? \| \[.+\]\((.+)\.md\) \|", INDEX, re.MULTILINE)


def product_strings() -> set[str]:
    """Return all constant parts of strings in the product, as they are printed."""
    trees = [ast.parse(path.read_text()) for folder in ("dis_scale", "pipelines") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_each_message_of_the_index_is_one_of_the_product() -> None:
    """A message is parts of a string with `...` between them."""
    strings = product_strings()
    known = list(messages())
    assert len(known) > 30
    assert {program for _, program, _ in known} <= {"", *OTHERS}
    parts = [part.strip() for message, program, _ in known if not program for part in message.split("...") if part]
    assert [part for part in parts if len(part) < 6 or not any(part in string for string in strings)] == []


def test_the_index_leads_to_each_page() -> None:
    assert {page for _, _, page in messages()} == RUNBOOKS.keys()


def test_pages_that_the_product_and_the_alerts_name_exist() -> None:
    texts = [*product_strings(), (ROOT / "ops" / "prometheus" / "alerts.yaml").read_text()]
    named = {name for text in texts for name in re.findall(r"ops/runbooks/([\w-]+)\.md", text)}
    assert len(named) > 5
    assert named <= RUNBOOKS.keys()


def runbook_commands(text: str) -> list[list[str]]:
    """Return our own commands in a runbook's code."""
    lines = [line.strip() for block in blocks(text) for line in block.splitlines()]
    ours = [line.partition(" | ")[0] for line in lines if re.match(r"(python -m|dis-scale) ", line)]
    return [shlex.split(line, comments=True) for line in ours]


def require_runbook_command(words: list[str]) -> None:
    require_shape(words[1:] if words[0] == "dis-scale" else ["sweep", *words[3:]])


def test_the_runbooks_commands_exist() -> None:
    commands = {name: runbook_commands(text) for name, text in RUNBOOKS.items()}
    assert [name for name in RUNBOOKS if not commands[name]] == []
    assert failures(require_runbook_command, (words for name in RUNBOOKS for words in commands[name])) == []


def test_no_session_of_a_ray_that_runs_is_listed_as_safe_to_delete(tmp_path: Path) -> None:
    (line,) = [line.strip() for line in RUNBOOKS["disk-full"].splitlines() if line.strip().startswith("for session in")]
    used, ended = tmp_path / "session_2026-01-02_used", tmp_path / "session_2026-01-01_ended"
    for session in (used, ended):
        session.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()", f"--session-dir={used}"], stdin=subprocess.PIPE) as raylet:
        listed = subprocess.run(["bash"], input=line.replace("/tmp/ray", str(tmp_path)), capture_output=True, text=True)
        raylet.kill()
    assert listed.stdout.split() == [str(ended)]


LINKING = [*(ROOT / name for name in TREE if re.fullmatch(r"\w+\.md", name)), *sorted((ROOT / "docs").glob("*.md")),
           *sorted((ROOT / "ops" / "runbooks").glob("*.md")), *RESULTS]  # fmt: skip
"""Pages whose links are followed."""


def links_of(page: Path) -> list[str]:
    """Return the files and sections of this repository that a page links to."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]


def test_links_lead_to_a_file() -> None:
    """Not to a page that only the built site has: on GitHub and in an editor such a link is dead."""
    links = [(page, link) for page in LINKING for link in links_of(page)]
    pictures = (ROOT / "docs" / "images").exists()
    assert len(links) > 10
    missing = [(page, link) for page, link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert [(page.name, link) for page, link in missing if pictures or "images/" not in link] == []


def test_files_that_a_page_names_exist() -> None:
    """Paths from the repository's root, in the pages' text; those with a placeholder in capitals are not meant."""
    pattern = re.compile(r"`((?:dis_scale|pipelines|tests|configs|cluster|ops|benchmarks|docs)/[\w./-]+)`")
    named = {(page.name, path) for page in LINKING for path in pattern.findall(page.read_text())}
    assert len(named) > 50
    assert {(page, path) for page, path in named if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()} == set()


def known_settings() -> set[str]:
    """Return all settings as a page names them, `train.lanes`; those of several kinds have no kind, those of a model no name."""
    return {
        f"{path}.{name}".lstrip(".").replace("NAME.", "")
        for path, part in settings.parts() for name in part.model_fields
    }  # fmt: skip


SECTION = r"(?:train|evaluate|data|vae|precompute|reader|storage|tracking|isoflop)"


def test_settings_that_a_page_names_exist() -> None:
    """Also with a value: `train.workers=4`. `train.cooldowns` is a short form."""
    pattern = re.compile(rf"(?:`|--set )({SECTION}(?:\.[a-z_]+)+)(?=[`=: ])")
    named = {(page.name, name) for page in LINKING for name in pattern.findall(page.read_text())}
    assert len(named) > 50
    files = {name for _, name in named if name.endswith((".py", ".md", ".json", ".yaml"))}
    known = known_settings() | files | {"train.cooldowns"}
    assert {(page, name) for page, name in named if name not in known} == set()


def test_exit_codes_that_a_page_names_exist() -> None:
    named = {(page.name, int(code)) for page in LINKING for code in re.findall(r"exit code[s:]? (\d+)", page.read_text())}
    assert len(named) > 10
    assert {(page, code) for page, code in named if code not in EXIT_CODES} == set()


def test_the_recipe_for_own_images_is_valid() -> None:
    assert SNIPPETS
    for name in SNIPPETS:
        assert f"{load(name, []).name}.yaml" == name


def unpriced(path: Path) -> list[str]:
    """Return the rows of computed prices that a recipe's first lines lack."""
    recipe, text = reading.load(path), path.read_text()
    if isinstance(recipe.vae, NoVae):
        shape = LatentShape(3, recipe.data.resolution)
    else:
        shape = LatentShape(4, recipe.data.resolution // SD_FACTOR)
    plan = price_sweep(recipe, shape)
    lines, rows = [" ".join(line.split()) for line in text.splitlines()], []
    for name, model in recipe.models.items():
        if model.branch or recipe.seed_groups()[name] != name:
            continue  # its size is priced
        cost, trained, sampled = plan.costs[name], plan.own_flops(name) / 1e18, plan.sampling_flops(name) / 1e18
        rows.append(f"# {name} {cost.parameters:,} {cost.gmacs_forward:.4g} {trained:.3g} {sampled:.3g}")
    return [row for row in rows if row not in lines]


def test_each_recipe_states_its_own_price() -> None:
    assert PRICED
    assert {path.stem: rows for path in PRICED if (rows := unpriced(path))} == {}


@pytest.mark.parametrize("name", ["digits-hybrids", "digits-tokens"])
def test_a_study_gives_each_model_the_same_multiply_adds(name: str) -> None:
    """As nearly as whole batches allow."""
    recipe = reading.load(ROOT / "configs" / f"{name}.yaml")
    priced = price_sweep(recipe, LatentShape(3, recipe.data.resolution))
    flops = {model: priced.own_flops(model) for model in priced.costs}
    mean = sum(flops.values()) / len(flops)
    assert {model: share for model, each in flops.items() if abs((share := each / mean) - 1) > 0.015} == {}


def test_no_file_names_a_path_of_one_machine() -> None:
    assert {str(p.relative_to(ROOT)): found for p in FILES if (found := MACHINE_PATHS.findall(p.read_bytes()))} == {}
