#!/bin/bash
# States of the Slurm jobs of the last day for node_exporter's textfile collector: from cron every minute, on a node with sacct,
#
#   ops/prometheus/slurm-jobs.sh /var/lib/prometheus/node-exporter/dis_scale_slurm.prom [JOB_NAME]
#
# JOB_NAME is that of cluster/slurm.sh by default. A job that is queued again has the state of its last run; one that Slurm holds, which
# it does after too many failures to start, is HELD: it would wait for ever. One that its user holds is not.
set -euo pipefail

out=$1 name=${2:-dis-scale}
jobs=$(sacct --allusers --allocations --noheader --parsable2 --name="$name" --starttime=now-1day --format=JobID,State)
queue=$(squeue --noheader --name="$name" --format='%A|%r') # a job and the reason why it waits
{
    echo '# HELP dis_scale_slurm_job_state 1 for the state of a Slurm job.'
    echo '# TYPE dis_scale_slurm_job_state gauge'
    while IFS='|' read -r job state; do # "CANCELLED by 1000" is CANCELLED
        [ -z "$job" ] || echo "dis_scale_slurm_job_state{slurm_job=\"$job\",state=\"${state%% *}\"} 1"
    done <<< "$jobs"
    while IFS='|' read -r job reason; do # such as JobHeldAdmin, JobHoldMaxRequeue, "launch failed requeued held"
        case $reason in
            JobHeldUser) ;;
            *[Hh]eld* | JobHoldMaxRequeue) echo "dis_scale_slurm_job_state{slurm_job=\"$job\",state=\"HELD\"} 1" ;;
        esac
    done <<< "$queue"
    echo '# HELP dis_scale_slurm_jobs_timestamp_seconds Time of these states.'
    echo '# TYPE dis_scale_slurm_jobs_timestamp_seconds gauge'
    echo "dis_scale_slurm_jobs_timestamp_seconds{name=\"$name\"} $(date +%s)"
} > "$out.$$"
chmod 644 "$out.$$"
mv "$out.$$" "$out" # whole, also while it is read
