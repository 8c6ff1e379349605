"""Words that `--help` and the page of all commands share: an example of each command, and the exit codes."""

EXAMPLES = {
    "init": "dis-scale init /data/photos --out photos.yaml",
    "doctor": "dis-scale doctor s3://bucket/prefix --recipe configs/imagenet256.yaml",
    "sweep": "dis-scale sweep configs/digits.yaml --set train.workers=1",
    "resume": "dis-scale resume outputs/sweeps/digits --set train.workers=4",
    "plan": "dis-scale plan imagenet256 --images 1281167 --gpu h100 --count 64 --price 2.5 --preemptions-per-day 3",
    "stop": "dis-scale stop outputs/sweeps/digits",
    "status": "dis-scale status outputs/sweeps/digits --watch 10",
    "logs": "dis-scale logs outputs/sweeps/digits dis-m",
    "fork": "dis-scale fork outputs/sweeps/digits dis-m --at 32000 --as dis-m-slow --set learning_rate=5e-5",
    "profile": "dis-scale profile outputs/sweeps/digits dis-m --steps 10 --trace trace.json",
    "report": "dis-scale report outputs/sweeps/digits",
    "measure": "dis-scale measure samples.npz VIRTUAL_imagenet256_labeled.npz",
    "compare": "dis-scale compare outputs/sweeps/digits outputs/sweeps/digits-2 --pair dis-m=dit-s",
    "sample": "dis-scale sample outputs/sweeps/digits/runs/dis-m --classes 1,7",
    "verify": "dis-scale verify outputs/sweeps/digits",
    "gc": "dis-scale gc outputs/sweeps/digits",
    "delete": "dis-scale delete outputs/sweeps/digits",
    "export": "dis-scale export outputs/sweeps/digits/runs/dis-m/published/000000064000 dis-m-for-diffusers",
    "import": "dis-scale import DiT-XL-2-256x256.pt imagenet256_dit --model dit-xl --images 1792000000",
    "data gc": "dis-scale data gc outputs",
    "recipe list": "dis-scale recipe list",
    "recipe show": "dis-scale recipe show configs/digits.yaml",
    "recipe diff": "dis-scale recipe diff configs/imagenet256.yaml configs/imagenet512.yaml",
    "recipe schema": "dis-scale recipe schema",
    "ablate guidance": "dis-scale ablate guidance outputs/sweeps/digits dis-m --scales 1,1.15,1.3,2",
    "ablate ema": "dis-scale ablate ema outputs/sweeps/digits dis-m --widths 0.05,0.07,0.1",
    "data verify": "dis-scale data verify outputs/sweeps/digits --fast",
    "data repair": "dis-scale data repair outputs/sweeps/digits",
    "data export": "dis-scale data export outputs/sweeps/digits --layout edm2 --out latents-edm2",
    "data show": "dis-scale data show outputs/sweeps/digits --out latents.png",
    "node forgive": "dis-scale node forgive outputs/sweeps/digits node-7",
    "mlflow sync": "dis-scale mlflow sync outputs/sweeps/digits --uri sqlite:///mlflow.db",
}
"""An example of each command, by its words: in its --help and on the page of all commands."""
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ends, by Typer."""
EXIT_CODES = {
    0: "done",
    1: "a stage, a model or a check failed; the line gives the reason. The other models continued, and the report marks the "
    "failed one",
    2: "invalid input: one line names the setting, its place and what was expected; also storage that cannot be used",
    69: "the same sweep is running on another cluster, or another process holds one of its stages; the line says where",
    70: "an error that nobody foresaw, with its traceback: a mistake of ours, or an accident of this machine",
    74: "storage did not answer for about a minute (commands that only look ask for seconds), Ray's dashboard for 15, or the node "
    "of the command is being drained: run the same command again",
    75: "stopped as requested, with all state saved; a rerun continues",
    INTERRUPTED: "ended at once by a second Ctrl-C or SIGTERM; a rerun continues from what was saved",
}
"""Meaning of each exit code."""
