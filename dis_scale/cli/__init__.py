"""The `dis-scale` command. Exit code 0, 2 for a user's mistake, 1 for a failure, 69 if held elsewhere, 70 if
nobody foresaw it, 74 if storage is away, 75 if stopped as requested, 130 if a second signal ended it.

Each command imports what it needs when it runs, so that `--help` and a mistake are answered at once.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from dis_scale import __version__
from dis_scale.cli import checkpoints, pricing, recipes, results, running, sampling, starting, stored
from dis_scale.cli.help import EXAMPLES, EXIT_CODES, INTERRUPTED
from dis_scale.process import jsonlog
from dis_scale.process.context import Context
from dis_scale.process.errors import (
    UNFORESEEN,
    DisScaleError,
    Preempted,
    UserError,
    drop_unwritten,
    losing_lines,
    shown,
    shown_below,
)
from dis_scale.process.redaction import redact

NAME = "dis-scale"


def _group(above: str, words: str, end: str = "", **commands: Callable[..., None]) -> typer.Typer:
    """Return a group of commands, each with its example; `above` are the words before a command's name."""
    group = typer.Typer(help=words, epilog=end, no_args_is_help=True, pretty_exceptions_enable=False)
    for name, command in commands.items():
        group.command(name, epilog=f"Example: {EXAMPLES[above + name]}")(command)
    return group


app = _group(
    "",
    "Scaling sweeps of diffusion models with a state-space backbone.",
    "\n\n".join(["Exit codes:", *(f"{code}: {words}" for code, words in EXIT_CODES.items())]),
    init=starting.init, doctor=starting.doctor,
    sweep=running.sweep, resume=running.resume, plan=pricing.plan, stop=running.stop, status=running.status,
    logs=running.logs, fork=running.fork, profile=running.profile,
    report=results.report, compare=results.compare, measure=results.measure, sample=sampling.sample,
    export=checkpoints.export, **{"import": checkpoints.import_weights},
    verify=stored.verify_results, gc=stored.gc, delete=stored.delete,
)  # fmt: skip
ablations = _group(
    "ablate ", "Evaluate one checkpoint at several values of one sampling setting.", guidance=results.guidance, ema=results.ema
)
data = _group(
    "data ",
    "Verify, repair, describe and delete latents.",
    verify=stored.data_verify, repair=stored.data_repair, show=stored.data_show, export=stored.data_export, gc=stored.data_gc,
)  # fmt: skip
recipe = _group(
    "recipe ",
    "Show a recipe's settings and numbers, compare recipes, list the shipped ones, print their JSON schema.",
    show=recipes.show_recipe, diff=recipes.diff, list=recipes.shipped, schema=recipes.schema,
)  # fmt: skip
app.add_typer(recipe, name="recipe")
app.add_typer(_group("node ", "Nodes that a sweep excludes.", forgive=stored.forgive), name="node")
app.add_typer(ablations, name="ablate")
app.add_typer(data, name="data")
app.add_typer(_group("mlflow ", "MLflow, a copy of what is in storage.", sync=results.sync), name="mlflow")


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # Typer calls it so
    if wanted:
        print(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    _: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    __: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


def _print_end(context: Context, words: str, before: str = "", *, drives: bool) -> None:
    """Print the last line of a command; one of JSON if it drives a sweep whose lines are."""
    as_json = drives and os.environ.get(jsonlog.VARIABLE) == "json"
    line = jsonlog.entry(context, "error", "error", message=words) if as_json else shown_below(before + words)
    with losing_lines():
        print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error of ours becomes one line and its exit code, below its traceback if `--debug` is given anywhere."""
    words = sys.argv[1:] if arguments is None else arguments
    drives = [word for word in words if word != "--debug"][:1] in (["sweep"], ["resume"])
    try:
        _run(words, drives=drives)
    finally:
        if drives:  # of other commands the output is what they are for
            drop_unwritten()


def _run(words: list[str], *, drives: bool) -> None:
    context = Context()
    try:
        app([word for word in words if word != "--debug"], prog_name=NAME, obj=context)
        return
    except SystemExit as end:  # by Typer
        if drives and end.code == INTERRUPTED:
            _print_end(context, "ended at once; what was saved is kept, and the same command continues", drives=drives)
        if not drives or end.code != UserError.exit_code:
            raise
        code = UserError.exit_code
    except DisScaleError as error:
        if "--debug" in words:
            print(shown(redact(traceback.format_exc())), end="", file=sys.stderr)
        _print_end(context, str(error), "" if isinstance(error, Preempted) else "error: ", drives=drives)
        code = error.exit_code
    except Exception:
        with losing_lines():
            print(shown(redact(traceback.format_exc())), end="", file=sys.stderr)
        code = UNFORESEEN
    if drives:
        from pipelines.jobs import end_own_job

        code = end_own_job(code)
    raise SystemExit(code)
