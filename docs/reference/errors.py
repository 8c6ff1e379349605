"""The page of errors: each kind with cause and cure, and all messages that the code raises, with their runbooks."""

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from docs.reference.markdown import code, table

ROOT = Path(__file__).parents[2]
INTRODUCTION = """# Errors

An error is one line on stderr, `error: ...`, with the reason and what to do. `--debug` shows the traceback. All messages below
are generated from the code; `...` is a name, a number or a reason. To find a line, search this page for a part of it without
names and numbers.

Lines of a running sweep that are no errors (restarts, skipped steps, waiting) are in the
[index of the runbooks](../ops/runbooks/README.md). If a stage failed, `dis-scale logs SWEEP MODEL` prints what its processes
wrote, with the traceback.
"""


class Kind(NamedTuple):
    """An error class for users."""

    cause: str
    cure: str


KINDS = {
    "DisScaleError": Kind(
        "A stage, a model or a check failed. The line names it.",
        "Read the reason in the line, then `dis-scale status SWEEP` and `dis-scale logs SWEEP MODEL`. A rerun repeats only what "
        "failed.",
    ),
    "UserError": Kind(
        "A setting, an option, a file or the machine does not fit. Nothing was spent: input is checked before the first stage.",
        "Change what the line names. It has the value that was given and what was expected.",
    ),
    "NoFamily": Kind(
        "A model is of a family that another package or a file brings, and this machine lacks it, or has another version.",
        "Install the package, or put the file where the line says. See "
        "[bring a backbone](extending.md#bring-a-backbone).",
    ),
    "StorageError": Kind(
        "Storage refuses a request, or has another content than expected: a missing folder, a wrong key, a wrong layout.",
        "Check the URL, the keys and their rights: `dis-scale doctor ROOT`.",
    ),
    "StorageAway": Kind(
        "Storage did not answer, although each request was repeated for about a minute.",
        "Run the same command again when storage answers. Nothing is lost. See [storage-down](../ops/runbooks/storage-down.md).",
    ),
    "Damaged": Kind(
        "A file differs from the size or hash in its manifest, or is missing.",
        "`dis-scale verify SWEEP` names every damaged file with its cure; latents: `dis-scale data repair SWEEP`. See "
        "[damaged-resume-point](../ops/runbooks/damaged-resume-point.md).",
    ),
    "StorageFull": Kind(
        "No space is left on the disk or in the quota.",
        "Free space (`dis-scale gc SWEEP` lists what no result needs), then run the same command again. See "
        "[disk-full](../ops/runbooks/disk-full.md).",
    ),
    "Held": Kind(
        "Another live process writes the same sweep, stage or model. Nothing was written.",
        "Wait for it, or stop it: `dis-scale stop SWEEP`. See [another-cluster](../ops/runbooks/another-cluster.md).",
    ),
    "OutOfMemory": Kind(
        "The memory of a GPU or of a node is too small for the settings. A rerun would fail in the same way.",
        "Smaller `train.micro_images`, `train.checkpointing`, a higher `train.zero_stage`, or smaller `evaluate.batch_images`. See "
        "[out-of-memory](../ops/runbooks/out-of-memory.md).",
    ),
    "BrokenDevice": Kind(
        "A GPU fails or computes wrongly. The failure counts against its node, which is excluded after two.",
        "None at first: another attempt starts by itself. After two failures repair the node. See "
        "[bad-gpu-or-node](../ops/runbooks/bad-gpu-or-node.md).",
    ),
    "UndecodableImage": Kind(
        "A file in the source is empty, damaged, too large or no image.",
        "Remove or replace it, or set `data.undecodable: skip`, which leaves such images out and lists them.",
    ),
    "WorkerFailure": Kind(
        "A worker or its node was lost, a connection broke, or no step ended in `train.hang_after_s`.",
        "None at first: another attempt starts by itself. `train.restarts` limits consecutive attempts without progress. See "
        "[preempted-sweep](../ops/runbooks/preempted-sweep.md) and [stuck-job](../ops/runbooks/stuck-job.md).",
    ),
    "StorageFailure": Kind(
        "Storage did not answer a worker for about a minute.",
        "None: another attempt starts by itself. If storage stays away: [storage-down](../ops/runbooks/storage-down.md).",
    ),
    "DeviceFailure": Kind(
        "A GPU failed during an attempt. The failure counts against its node.",
        "None at first: another attempt starts by itself. See [bad-gpu-or-node](../ops/runbooks/bad-gpu-or-node.md).",
    ),
    "Preempted": Kind(
        "The sweep or one of its stages was requested to stop, and has saved its state.",
        "`dis-scale resume SWEEP` continues. See [preempted-sweep](../ops/runbooks/preempted-sweep.md).",
    ),
}  # fmt: skip
"""Cause and cure of each error class."""


class Message(NamedTuple):
    """A message of the code, and the module that raises it, such as `storage/folder`."""

    kind: str
    module: str
    text: str


class Error(NamedTuple):
    """An error class of the code."""

    name: str
    purpose: str
    exit_code: int


def page() -> str:
    """Return the page in Markdown."""
    by_kind = defaultdict[str, dict[tuple[str, str], None]](dict)
    for message in messages():
        by_kind[message.kind][message.module, message.text] = None
    return "\n\n".join([INTRODUCTION, *(_section(each, list(by_kind[each.name])) for each in kinds())])


@functools.cache
def kinds() -> list[Error]:
    """Return all error classes of the code, a base before those that it is the base of."""
    found = {"Exception": Error("Exception", "", 1)}
    for tree in _modules().values():
        for node in ast.walk(tree):
            match node:
                case ast.ClassDef(name=name, bases=[ast.Name(id=base)]) if base in found:
                    words = ast.get_docstring(node) or ""
                    found[name] = Error(name, words, _exit_code(node, found[base].exit_code))
    return list(found.values())[1:]


def _exit_code(node: ast.ClassDef, inherited: int) -> int:
    for each in node.body:
        match each:
            case ast.Assign(targets=[ast.Name(id="exit_code")], value=ast.Constant(value=int(code))):
                return code
    return inherited


@functools.cache
def _modules() -> dict[str, ast.Module]:
    """Return all modules of the product by name, such as `storage/folder`; that of the errors is the first."""
    paths = [*(ROOT / "dis_scale").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    paths.sort(key=lambda path: (path != ROOT / "dis_scale" / "errors.py", path))
    names = [str(path.relative_to(ROOT).with_suffix("")) for path in paths]
    names = [name.removeprefix("dis_scale/").removesuffix("/__init__") for name in names]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def _section(error: Error, found: list[tuple[str, str]]) -> str:
    kind = KINDS[error.name]
    rows = [(code(text), code(module), _runbook(text)) for module, text in sorted(found)]
    parts = [
        f"## {error.name} {{#{error.name.lower()}}}",
        f"{error.purpose} Exit code {error.exit_code}.",
        f"* Cause: {kind.cause}\n* Cure: {kind.cure}",
    ]
    return "\n\n".join(parts + ([table(("message", "module", "runbook"), rows)] if rows else []))


def messages() -> Iterator[Message]:
    """Yield each message that the code raises."""
    for module, tree in _modules().items():
        for kind, words in _of_module(tree, module):
            if re.search(r"[A-Za-z]{3}", text := _text(words)):
                yield Message(kind, module, text)


def _of_module(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield kind and expression of each message; reading a recipe turns the ValueError of its types into a UserError."""
    names = {error.name for error in kinds()}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[words, *_]) if name in names:
                yield name, words
            case ast.Call(func=ast.Name(id="ValueError"), args=[words, *_]) if module.startswith("recipe"):
                yield "UserError", words
            case ast.Yield(value=ast.JoinedStr() as words) if module == "recipe/reading":
                yield "UserError", words


def _text(node: ast.expr) -> str:
    """Return a string as it is printed, with `...` for its variable parts."""
    match node:
        case ast.Constant(value=str(words)):
            return " ".join(words.split())
        case ast.JoinedStr(values=parts):
            words = "".join(p.value if isinstance(p, ast.Constant) else "..." for p in parts)  # type: ignore[misc]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            words = f"{_text(left)}{_text(right)}"
        case _:
            return "..."
    return re.sub(r"(\.{3}\s*){2,}", "... ", " ".join(words.split())).strip()


@functools.cache
def index() -> dict[str, str]:
    """Return the runbook of each message in their index."""
    text = (ROOT / "ops" / "runbooks" / "README.md").read_text()
    return dict(re.findall(r"^\| `(.+?)`(?: \(.+?\))? \| \[(.+)\]\(.+\.md\) \|", text, re.MULTILINE))


def _runbook(text: str) -> str:
    """Return a link to the message's runbook, or nothing."""
    for known, name in index().items():
        if all(part.strip() in text for part in known.split("...") if part.strip()):
            return f"[{name}](../ops/runbooks/{name}.md)"
    return ""
