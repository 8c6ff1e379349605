"""The page of all commands, from the command line itself: usage, arguments, options; and exit codes and environment variables."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from dis_scale.cli import app
from dis_scale.cli.help import EXAMPLES, EXIT_CODES, INTERRUPTED
from dis_scale.process.errors import UNFORESEEN, DisScaleError
from docs.reference.markdown import code, subclasses, table

ROOT = Path(__file__).parents[2]
INTRODUCTION = """# Commands

All commands, generated from the command line itself. `SWEEP` is a sweep's folder: `outputs/sweeps/digits`, or
`s3://bucket/prefix/sweeps/NAME`. `RECIPE` is a YAML file or the name of a shipped recipe (`dis-scale recipe list`).
`python -m dis_scale` is the same as `dis-scale`, and `python -m dis_scale.sweep` the same as `dis-scale sweep`: these forms are for
Ray jobs. `--debug` before or after any command shows the traceback of an error. After `dis-scale --install-completion` your shell
completes commands, options and shipped recipes.
"""
ENVIRONMENT = {
    "RAY_ADDRESS": "The Ray cluster that a sweep uses. Ray sets it within a job. Without it a sweep starts a Ray of its own on "
    "this machine.",
    "RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH": "`token`, and Ray's token or a file that has it.",
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL": "Keys of an object store, and the URL of a store "
    "other than Amazon's.",
    "HF_HOME, HF_TOKEN, HF_HUB_OFFLINE": "Hugging Face's cache, token and offline mode, for a `vae.path` that is a hub id.",
    "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD": "Login of an MLflow server.",
    "DIS_SCALE_LOG": "`json`: the terminal of a sweep gets one JSON line for each event; default: `lines`.",
    "NO_COLOR, FORCE_COLOR": "No colours on a terminal; colours also in other outputs. Default: colours only on a terminal.",
    "DIS_SCALE_FAILED_IS_FINAL": "Set on a KubeRay head: a sweep whose error a new cluster would only repeat ends its Ray job as "
    "stopped, so that KubeRay starts no new cluster.",
    "RAY_JOB_STOP_WAIT_TIME_S": "Set on a head: the time that `ray job stop` gives a sweep to stop its jobs, to mark its page and "
    "to tell Prometheus; Ray's default is 3 s. Jobs of stages have the recipe's `grace_s`.",
    "DIS_SCALE_FAULTS": "A file of injected faults, for tests.",
    "DIS_SCALE_ISA": "Instruction set of the native scan: `plain`, `avx2` or `avx512`; default: the best of this CPU.",
    "CXX, CC": "The compiler of the native scan, and that of Triton's launcher.",
    "XDG_CACHE_HOME": "Cache of the compiled native scan; default: `~/.cache`.",
    "CUDA_VISIBLE_DEVICES": "The GPUs that a sweep on this machine uses.",
    "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME": "Network interfaces of gloo and NCCL; default: that of the node's address in Ray.",
}  # fmt: skip
"""Environment variables that users set, with their meaning."""


def page() -> str:
    """Return the page in Markdown."""
    codes = table(("exit code", "meaning"), ((str(number), words) for number, words in EXIT_CODES.items()))
    variables = table(
        ("variable", "meaning"), ((", ".join(map(code, names.split(", "))), words) for names, words in ENVIRONMENT.items())
    )
    sections = [_section(name, command) for name, command in commands()]
    return "\n\n".join([INTRODUCTION, *sections, "## Exit codes", codes, "## Environment variables", variables])


def commands(within: Any = None, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command's words, such as `data verify`, and the command."""
    group: Any = within or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")
        else:
            yield f"{path}{name}", command


def exit_codes() -> set[int]:
    """Return all codes with which a command ends."""
    return {0, INTERRUPTED, UNFORESEEN, DisScaleError.exit_code, *(each.exit_code for each in subclasses(DisScaleError))}


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([f"dis-scale {name}", *(_shown(p) for p in arguments), "[OPTIONS]"])
    context = typer.Context(command)
    rows = [(code(_usage(p, context)), p.help or "", _default(p)) for p in command.params if p.name != "help"]
    parts = [f"## dis-scale {name}", command.help, f"    {usage}"]
    if rows:
        parts.append(table(("argument or option", "meaning", "default"), rows))
    return "\n\n".join([*parts, f"Example:\n\n    {EXAMPLES[name]}"])


def _shown(argument: Any) -> str:
    name = argument.name.upper()
    return name if argument.required else f"[{name}]"


def _usage(parameter: Any, context: Any) -> str:
    """Return an option with the type of its value."""
    if parameter.param_type_name == "argument":
        return _shown(parameter)
    flags = ", ".join(parameter.opts)
    return flags if parameter.is_flag else f"{flags} {parameter.metavar or parameter.display_type(context)}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False, (), []) else code(str(parameter.default).removeprefix(f"{ROOT}/"))
