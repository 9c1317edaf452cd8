#!/usr/bin/env bash
# Cancel all jobs, and end and delete what slurm_up.sh started.
set -uo pipefail

state=${SLURM_STATE:-/tmp/mae-slurm}
[ -d "$state" ] || exit 0
export SLURM_CONF=$state/slurm.conf

for job in $(timeout 10 squeue -h -o %A 2>/dev/null | sort -u); do
  scancel "$job"
done
for _ in $(seq 100); do
  [ -z "$(timeout 10 squeue -h 2>/dev/null)" ] && break
  sleep 0.2
done

for file in "$state"/slurmd.*.pid "$state"/slurmctld.pid "$state"/munged.pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  # the number may be another process's by now
  case $(cat "/proc/$pid/comm" 2>/dev/null) in slurmd | slurmctld | munged) ;; *) continue ;; esac
  kill "$pid"
  for _ in $(seq 75); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
  done
done

# in place: in a container /etc/hosts is a mount that cannot be replaced
hosts=$(grep -v '# mae-slurm$' /etc/hosts)
printf '%s\n' "$hosts" >/etc/hosts
rm -rf "$state"
