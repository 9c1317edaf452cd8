#!/usr/bin/env bash
# Start a real Slurm on this machine without systemd: munged, slurmctld and two slurmd, "nodes" n1
# and n2, on 127.0.0.1 alone. Needs root (Debian, Ubuntu). A second call finds it up.
#
#     eval "$(tests/slurm/slurm_up.sh)"      # sets SLURM_CONF
#     tests/slurm/slurm_down.sh
#
# Everything lives in $SLURM_STATE (/tmp/mae-slurm) but two lines of /etc/hosts, the nodes' names.
set -euo pipefail

state=${SLURM_STATE:-/tmp/mae-slurm}
export SLURM_CONF=$state/slurm.conf
host=$(hostname -s)
say() { echo "slurm_up: $*" >&2; }

for command in slurmctld slurmd munged; do
  command -v "$command" >/dev/null && continue
  say "installing slurm-wlm and munge"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -o DPkg::Lock::Timeout=300 update -qq >&2
  apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends slurm-wlm munge >&2
  break
done

nodes_up() {
  [ -s "$SLURM_CONF" ] || return 1
  [ "$(timeout 10 sinfo -h -N -o %T 2>/dev/null | grep -cE '^(idle|mixed|allocated|completing)$')" = 2 ]
}
if nodes_up; then
  say "already up"
  echo "export SLURM_CONF=$SLURM_CONF"
  exit 0
fi

mkdir -p "$state"/{munge,log,state,spool.n1,spool.n2}
chmod 0755 "$state" "$state/munge"
[ -s "$state/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$state/munge/key")
for node in n1 n2; do
  grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node # mae-slurm" >>/etc/hosts
done

# 22.05 and older know no way to do without a cgroup plugin, but need no cgroup for this one
case $(slurmctld -V | sed 's/.* //') in
  2[0-2].*) echo CgroupPlugin=cgroup/v1 ;;
  *) echo CgroupPlugin=disabled ;;
esac >"$state/cgroup.conf"

# cred_expire: a requeued job waits that long before it starts again (the default is 120 s).
# KillWait: seconds from SIGTERM to SIGKILL.
cat >"$SLURM_CONF" <<EOF
ClusterName=mae
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=26817
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd.%n.log
SlurmdSpoolDir=$state/spool.%n
StateSaveLocation=$state/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[27001-27002] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
EOF

running() { [ -s "$state/$1.pid" ] && kill -0 "$(cat "$state/$1.pid")" 2>/dev/null; }
running munged || {
  rm -f "$state"/munge/socket*
  munged --force --key-file="$state/munge/key" --socket="$state/munge/socket" \
    --pid-file="$state/munged.pid" --log-file="$state/log/munged.log" \
    --seed-file="$state/munge/seed" >&2
}
running slurmctld || slurmctld -i -f "$SLURM_CONF" >&2
for node in n1 n2; do
  running "slurmd.$node" || slurmd -N "$node" -f "$SLURM_CONF" >&2
done
for _ in $(seq 150); do
  nodes_up && break
  sleep 0.2
done
nodes_up || { say "not up after 30 s"; tail -n 20 "$state"/log/*.log >&2; exit 1; }
say "up: $(sinfo -h -N -o '%N %T' | tr '\n' ' ')"
echo "export SLURM_CONF=$SLURM_CONF"
