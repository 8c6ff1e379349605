"""The page of errors: each kind with its exit code, cause and cure. Messages lead to a runbook by the runbooks' index."""

import inspect
import sys
from typing import NamedTuple

from dis_scale.process.errors import DisScaleError
from docs.reference.markdown import code, table

PAGE = """# Errors

An error is one line on stderr, `error: ...` (without that word after a stop request), with the reason and what to do. `--debug`
shows the traceback. If a stage failed, `dis-scale logs SWEEP MODEL` prints the output of its processes, with the traceback.
A traceback without that option is an error that nobody foresaw: exit code 70; please report it.

The [index of the runbooks](../ops/runbooks/README.md) leads from a message to its page, also from lines that are not errors
(restarts, skipped steps, waiting). This table has the kinds of errors. In Python they are classes of
`dis_scale/process/errors.py`.
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
        "Storage refuses a request, or has another content than expected: a missing folder, a wrong key, a wrong layout; "
        "with exit code 2 if `sweep` or `resume` finds it at its start.",
        "Check the URL, the keys and their rights: `dis-scale doctor ROOT`.",
    ),
    "StorageAway": Kind(
        "Storage did not answer, although each request was repeated: by a sweep for about a minute, by commands that only look for "
        "some seconds.",
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
        "The memory of a GPU is too small for the settings, in training also with smaller forward passes. A rerun would "
        "fail in the same way.",
        "Smaller `train.micro_images`, `train.checkpointing`, a higher `train.zero_stage`, or smaller `evaluate.batch_images`. See "
        "[out-of-memory](../ops/runbooks/out-of-memory.md).",
    ),
    "BrokenDevice": Kind(
        "A GPU fails or computes wrongly. The failure counts against its node, which is excluded after two.",
        "None at first: another attempt starts by itself. After two failures repair the node. See "
        "[bad-gpu-or-node](../ops/runbooks/bad-gpu-or-node.md).",
    ),
    "WrongKernel": Kind(
        "A kernel fails, or its results are not those of its definition, on every GPU that tried it.",
        "Set what the error names. Where it is so on some GPUs only, it is `BrokenDevice`.",
    ),
    "NotFinite": Kind(
        "Samples are not finite on every GPU that made them: the checkpoint is skipped.",
        "Look at the loss of that model: its training may have diverged. Where it is so on some GPUs only, it is `BrokenDevice`.",
    ),
    "UndecodableImage": Kind(
        "A file in the source is empty, damaged, too large or not an image.",
        "Remove or replace it, or set `data.undecodable: skip`, which leaves such images out and lists them.",
    ),
    "Preempted": Kind(
        "The sweep or one of its stages was requested to stop, and has saved its state.",
        "`dis-scale resume SWEEP` continues. See [preempted-sweep](../ops/runbooks/preempted-sweep.md).",
    ),
}  # fmt: skip
"""Cause and cure of each error class."""


def page() -> str:
    """Return the page in Markdown."""
    rows = [(code(cls.__name__), str(cls.exit_code), *KINDS[cls.__name__]) for cls in classes()]
    return f"{PAGE}\n{table(('kind', 'exit code', 'cause', 'cure'), rows)}\n"


def classes() -> list[type[DisScaleError]]:
    """Return all error classes of the module of errors, in its order."""
    defined = vars(sys.modules[DisScaleError.__module__]).values()
    return [cls for cls in defined if inspect.isclass(cls) and issubclass(cls, DisScaleError)]
