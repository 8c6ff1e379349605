#!/bin/bash
# A sweep on Slurm: starts Ray on all nodes of the job, runs the sweep, forwards signals, and puts the job back into the queue.
#
#   sbatch cluster/slurm.sh configs/imagenet256.yaml --set storage.root=s3://bucket/prefix --set train.workers=8..32 \
#       --set device=cuda --set train.restarts=100 --set reader.cache_gib=45 --set evaluate.gpu_share=0.2  # or it is evaluated after training
#   sbatch cluster/slurm.sh resume s3://bucket/prefix/sweeps/imagenet256  # with the recipe and overrides that it has stored
#
# Submit it from the repository, on a file system that all nodes mount, with the environment of dis-scale active. Storage may be an
# object store (its keys in the environment) or a file system that all nodes mount. Change the lines below for your cluster, or
# override them on sbatch's command line.
#
# The job's time limit and a preemption are a stop request: training saves, and the job is queued again and continues. To stop it
# for good: dis-scale stop SWEEP, or scancel --batch --signal=INT JOB. An error (exit codes 1, 2) is not queued again; what may
# have passed by then is, until the job has been queued 1,000 times for any reason: storage or a node that is away (74), Ray's head
# that has died. Also, up to 100 times, a process that was killed (128 and more), which may do the same again, and a sweep that
# another process holds (69): Slurm may take a node for lost whose processes live on; up to 20 times what nobody foresaw (70).
# These two limits are for runs between two stops: one that comes to its time limit or a preemption begins the count again. Nodes
# that do not join Ray within ten minutes are done without once two runs have lacked some; if only the head joins, the 20th fails.
#SBATCH --job-name=dis-scale
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --mail-type=FAIL
# SIGTERM to this script 5 minutes before the time limit. A sweep that has not stopped after 4 of them (STOP_WAIT_S=240 in the
# environment), which are longer than the recipe's grace_s and a minute, is killed. For preemptions also set
# PreemptParameters=send_user_signal and a GraceTime in slurm.conf (https://slurm.schedmd.com/slurm.conf.html).
#SBATCH --signal=B:TERM@300
#
# Triton keeps compiled kernels in ~/.triton/cache. For a home that is slow or full, a folder that all nodes mount:
# export TRITON_CACHE_DIR=/scratch/$USER/triton
#
# Network of the GPUs, if NCCL does not find it by itself (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html):
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
set -euo pipefail

again=no requested='' fewer='' child='' restarts=${SLURM_RESTART_COUNT:-0} deadline=''
# shellcheck disable=SC2317 # called by a trap
stop() { # by TERM or INT
    [ "$1" = INT ] || deadline=${deadline:-$((SECONDS + ${STOP_WAIT_S:-240}))} # a second TERM gives no more time
    case "$requested,$1" in # a second signal ends the sweep at once: only a second INT asks for that
        ,TERM) again=yes && tell ;;
        ,INT | INT,INT) again=no && tell ;;
        TERM,INT) again=no ;;
    esac
    requested=${requested:-$1}
}
tell() {
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap 'stop TERM' TERM
trap 'stop INT' INT
mkdir -p "$HOME/.dis-scale"
ends=$HOME/.dis-scale/ends-$SLURM_JOB_ID # how the runs of this job since the last stop have ended, a word in a line
lately() { # how often
    local count
    count=$(grep -csx "$1" "$ends") || true
    echo "${count:-0}"
}
note() { # a full home ends nothing
    { echo "$1" >> "$ends"; } 2>/dev/null || true
}
passes() { # whether the end with $code may have passed in the next run
    [ "$code" = 74 ] || { { [ "$code" = 69 ] || [ "$code" -ge 128 ]; } && [ "$(lately "$code")" -le 100 ]; } ||
        { [ "$code" = 70 ] && [ "$(lately 70)" -le 20 ]; } ||
        ! timeout "$([ -n "$requested" ] && echo 30 || echo 300)" ray health-check --address "$RAY_IP:$RAY_PORT" > /dev/null 2>&1
}
run() { # a command, whose exit code is then in $code; a signal to this script reaches it
    "$@" &
    child=$!
    [ -z "$requested" ] || tell # meanwhile
    while kill -0 $child 2>/dev/null; do
        if [ -z "$deadline" ]; then
            wait $child || true # ends early when a signal was trapped
        elif [ $SECONDS -lt "$deadline" ]; then
            sleep 1 || true
        else # storage that hangs, for example: without this Slurm would kill the script too, and queue nothing again
            kill -KILL $child 2>/dev/null || true
            code=137
            return
        fi
    done
    code=0
    wait $child || code=$?
}

# Nobody else on these nodes may submit jobs to this Ray (https://docs.ray.io/en/latest/ray-security/token-auth.html).
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
token=$HOME/.dis-scale/ray-$SLURM_JOB_ID.token # for you: ops/runbooks/README.md, "On Slurm"
(umask 077 && echo "$RAY_AUTH_TOKEN" > "$token")
trap 'rm -f "$token"' EXIT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export RAY_IP=${RAY_IP:-$(hostname -I | cut -d' ' -f1)} # of the first node, where this script runs
# Ports by the job's number: two jobs may share a node.
export RAY_PORT=$((20000 + SLURM_JOB_ID % 4000 * 5)) RAY_ADDRESS=

# shellcheck disable=SC2016 # expanded on each node
srun bash -c '
    agent=$((RAY_PORT + 2 + SLURM_NODEID % 3))
    if [ "$SLURM_NODEID" = 0 ]; then
        exec ray start --head --block --disable-usage-stats --node-ip-address="$RAY_IP" --port="$RAY_PORT" \
            --dashboard-host=127.0.0.1 --dashboard-port=$((RAY_PORT + 1)) --dashboard-agent-listen-port=$agent
    fi
    trap exit TERM # after Ray, which drains the node
    while true; do # a node that Ray has taken for lost, for the silence of its network, joins again
        until ray health-check --address "$RAY_IP:$RAY_PORT" 2>/dev/null; do sleep 2; done
        ray start --block --disable-usage-stats --address="$RAY_IP:$RAY_PORT" --dashboard-agent-listen-port=$agent
        sleep 5
    done
' &

export RAY_ADDRESS=$RAY_IP:$RAY_PORT
run python -c '
import os, subprocess, sys, time

def nodes():
    """Number of nodes that have joined Ray; 0 until its first one answers."""
    count = "import ray; ray.init(logging_level=\"ERROR\"); print(sum(node[\"Alive\"] for node in ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0

wanted, before, deadline = int(os.environ["SLURM_NNODES"]), int(sys.argv[1]), time.monotonic() + 600
while (joined := nodes()) < wanted:
    if time.monotonic() > deadline:
        print(f"only {joined} of {wanted} nodes joined Ray within 10 minutes: see the lines of srun above", file=sys.stderr)
        if joined < 2 or before < 2:
            sys.exit(74)
        print("as in the runs before: the sweep begins with these", file=sys.stderr)
        sys.exit(3)
    time.sleep(5)
' "$(lately join)"
[ "$code" != 3 ] || { fewer=yes && code=0; }
if [ "$code" = 74 ] && [ -z "$requested" ]; then
    note join
    [ "$(lately join)" -lt 20 ] || { rm -f "$ends" && exit 1; } # no accident: another environment on its nodes, for example
fi
[ "$code" = 0 ] || [ "$code" = 74 ] || [ "$code" -ge 128 ] || [ -n "$requested" ] || exit "$code"

if [ "$code" = 0 ] && [ -z "$requested" ]; then
    program=dis_scale.sweep
    [ "${1:-}" != resume ] || program=dis_scale
    run python -m $program "$@"
    if [ "$code" = 0 ] || [ "$code" = 75 ]; then # Prometheus, if it scrapes this Ray, has to see that it ended well
        last_s=${LAST_SCRAPE_S:-30} left_s=$((${deadline:-$((SECONDS + 1000))} - SECONDS))
        [ -n "$requested" ] || trap '' TERM INT # done, or `dis-scale stop`: it does not continue
        sleep $((left_s < 0 ? 0 : left_s < last_s ? left_s : last_s)) || true
    fi
elif [ -n "$requested" ]; then
    code=75
fi
if [ "$code" = 75 ]; then # a stop: a signal has said whether it continues
    rm -f "$ends" || true
    [ -z "$fewer" ] || { note join && note join; } # the node that has not joined will not tomorrow
else
    note "$code"
    [ -n "$requested" ] || [ "$restarts" -ge 1000 ] || again=yes
    [ "$code" != 0 ] && { passes || { [ -n "$requested" ] && [ "$code" -ge 128 ]; }; } || again=no # a stop that took too long
fi
if [ "$again" = yes ]; then
    for _ in {1..40}; do # ten minutes, in which Slurm's controller may restart
        ! scontrol requeue "$SLURM_JOB_ID" || { again=done && break; }
        sleep 15
    done
    if [ "$again" = done ]; then
        echo "queued again: the sweep continues in the next run of job $SLURM_JOB_ID"
        sleep 60 # Slurm ends this run
    else
        echo "not queued again: scontrol requeue failed for ten minutes; resume the sweep by hand" >&2
        [ "$code" != 75 ] || code=1
    fi
fi
[ "$again" = done ] || rm -f "$ends" || true
[ "$code" != 75 ] || exit 0 # stopped as requested: a job that FAILED would page
exit "$code"
