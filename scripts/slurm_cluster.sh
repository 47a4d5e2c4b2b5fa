#!/usr/bin/env bash
# A complete Slurm cluster on one Debian host: munged, slurmdbd, slurmctld and
# several slurmd, as root and without systemd. The tests marked `slurm` use it.
#
#   slurm_cluster.sh install              install the Debian packages
#   slurm_cluster.sh start                start what is not running, wait until idle
#   slurm_cluster.sh stop                 cancel jobs and stop every daemon and job process
#   slurm_cluster.sh status               daemons, nodes and queue; exit 0 when usable
#   slurm_cluster.sh env                  print the exports a shell needs to use the cluster
#   slurm_cluster.sh run CMD [ARGS...]    run CMD with those exports
#   slurm_cluster.sh fail NODE            kill NODE's slurmd and all its job processes
#   slurm_cluster.sh heal NODE            bring NODE back
#   slurm_cluster.sh purge                stop, then delete the state directory
#
# Everything is kept in $SLURM_CLUSTER_DIR. Settings are read from the
# environment by the first `start` and stay in force until `purge`:
#
#   SLURM_CLUSTER_DIR    state directory                    /tmp/slurm_cluster
#   SLURM_NODES          number of nodes (node1..nodeN)     4
#   SLURM_NODE_CPUS      CPUs each node claims              8
#   SLURM_NODE_MEM_MB    memory each node claims            8192
#   SLURM_NODE_GPUS      fake GPUs per node (0 for none)    4
#   SLURM_PORT_BASE      first of the TCP ports used        16800
#   SLURM_ACCOUNTING     1: slurmdbd on a private MariaDB,  1
#                        which is what sacct needs
#   SLURM_HOSTS          1: while running, /etc/hosts maps  0
#                        node1..nodeN to 127.0.0.1
#
# Partitions: `main` (default; its jobs are requeued when preempted, after 30 s
# of grace), `urgent` (preempts main) and `short` (five minutes at most).

set -euo pipefail

DIR=${SLURM_CLUSTER_DIR:-/tmp/slurm_cluster}
CONF=$DIR/etc/slurm.conf
SETTINGS=$DIR/etc/settings
HOST=$(hostname -s)
HOSTS_TAG="# slurm_cluster $DIR"

say() { printf '%s\n' "$*" >&2; }
die() { say "slurm_cluster: $*"; exit 1; }

load_settings() {
    if [[ -f $SETTINGS ]]; then
        # shellcheck source=/dev/null
        source "$SETTINGS"
    else
        NODES=${SLURM_NODES:-4}
        CPUS=${SLURM_NODE_CPUS:-8}
        MEM=${SLURM_NODE_MEM_MB:-8192}
        GPUS=${SLURM_NODE_GPUS:-4}
        PORT=${SLURM_PORT_BASE:-16800}
        ACCOUNTING=${SLURM_ACCOUNTING:-1}
        HOSTS=${SLURM_HOSTS:-0}
    fi
}

node_names() { local i; for ((i = 1; i <= NODES; i++)); do echo "node$i"; done; }

# wait_for SECONDS COMMAND...: retry COMMAND until it succeeds or SECONDS have passed.
wait_for() {
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

# alive NAME PROGRAM: the pid in NAME.pid belongs to a running PROGRAM.
alive() {
    local pid
    pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) && [[ -n $pid ]] || return 1
    [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2" ]]
}

# clean_env COMMAND...: run COMMAND with a minimal environment, so that job
# environments hold what was submitted and nothing of the shell that ran `start`.
clean_env() {
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        HOME=/root LANG=C.UTF-8 SLURM_CONF="$CONF" MYSQL_UNIX_PORT="$DIR/run/mysql.sock" "$@"
}

# terminate NAME PROGRAM: TERM, then KILL after five seconds.
terminate() {
    local pid
    alive "$1" "$2" || { rm -f "$DIR/run/$1.pid"; return 0; }
    pid=$(cat "$DIR/run/$1.pid")
    kill -TERM "$pid" 2>/dev/null || true
    wait_for 5 gone "$pid" || kill -KILL "$pid" 2>/dev/null || true
    wait_for 2 gone "$pid" || say "slurm_cluster: $1 ($pid) does not end"
    rm -f "$DIR/run/$1.pid"
}
gone() { [[ ! -e /proc/$1 ]] || [[ $(awk '{print $3}' "/proc/$1/stat" 2>/dev/null) == Z ]]; }

# job_pids [NODE]: this cluster's slurmstepd and job processes, on NODE or on all
# nodes. A slurmstepd holds its node's log file open; a job process has the
# cluster's SLURM_CONF and its node's name in its environment.
job_pids() {
    local node=${1:-} f
    grep -lsx slurmstepd /proc/[0-9]*/comm | while read -r f; do
        if ls -l "${f%/comm}/fd" 2>/dev/null | grep -qF -- "-> $DIR/log/slurmd.${node:+$node.log}"; then
            basename "${f%/comm}"
        fi
    done
    grep -lsxzF "SLURM_CONF=$CONF" /proc/[0-9]*/environ | while read -r f; do
        if grep -qsxz "SLURMD_NODENAME=${node:-.*}" "$f"; then
            basename "${f%/environ}"
        fi
    done
}

kill_jobs() {
    local pids round
    for round in 1 2 3; do
        pids=$(job_pids "${1:-}" | grep -vx $$ || true)
        [[ -n $pids ]] || return 0
        # shellcheck disable=SC2086
        kill -KILL $pids 2>/dev/null || true
        sleep 0.1
    done
}

write_config() {
    local i plugin=accounting_storage/none
    mkdir -p "$DIR"/{etc,run,log,state,spool,dev,db,munge}
    chmod 755 "$DIR" "$DIR/run"
    chmod 700 "$DIR/munge"
    cat >"$SETTINGS" <<EOF
NODES=$NODES CPUS=$CPUS MEM=$MEM GPUS=$GPUS PORT=$PORT ACCOUNTING=$ACCOUNTING HOSTS=$HOSTS
EOF
    if [[ ! -s $DIR/munge/munge.key ]]; then
        (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/munge.key")
    fi
    ((ACCOUNTING)) && plugin=accounting_storage/slurmdbd

    # cred_expire bounds how soon a requeued job may start again.
    cat >"$CONF" <<EOF
ClusterName=lab
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmdSpoolDir=$DIR/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
AccountingStorageType=$plugin
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$DIR/run/munge.socket
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
MailProg=/bin/true
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
MaxArraySize=1001
DefMemPerCPU=256
EOF
    if ((GPUS)); then
        echo "GresTypes=gpu" >>"$CONF"
        : >"$DIR/etc/gres.conf"
        for ((i = 0; i < GPUS; i++)); do
            [[ -e $DIR/dev/gpu$i ]] || mknod "$DIR/dev/gpu$i" c 1 3
        done
        echo "NodeName=node[1-$NODES] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/etc/gres.conf"
    fi
    for ((i = 1; i <= NODES; i++)); do
        mkdir -p "$DIR/spool/node$i"
        echo "NodeName=node$i NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 10 + i))" \
            "CPUs=$CPUS RealMemory=$MEM $( ((GPUS)) && echo "Gres=gpu:$GPUS") State=UNKNOWN" >>"$CONF"
    done
    cat >>"$CONF" <<EOF
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=short Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=5 DefaultTime=2 State=UP
EOF
    cat >"$DIR/etc/slurmdbd.conf" <<EOF
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
CommunicationParameters=NoInAddrAny
PidFile=$DIR/run/slurmdbd.pid
LogFile=$DIR/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
EOF
    chmod 600 "$DIR/etc/slurmdbd.conf"
}

start_munged() {
    alive munged munged && return 0
    munged --key-file="$DIR/munge/munge.key" --socket="$DIR/run/munge.socket" --force \
        --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" \
        --seed-file="$DIR/munge/munged.seed" 2>>"$DIR/log/munged.err"
    wait_for 5 munge -S "$DIR/run/munge.socket" -n || die "munged does not answer, see $DIR/log/munged.log"
}

# MariaDB serves one database on a unix socket only, without grant tables and
# without the mysql system tables.
start_accounting() {
    ((ACCOUNTING)) || return 0
    if ! alive mariadbd mariadbd; then
        clean_env setsid mariadbd --no-defaults --user=root --datadir="$DIR/db" \
            --socket="$DIR/run/mysql.sock" --pid-file="$DIR/run/mariadbd.pid" \
            --skip-networking --skip-grant-tables --innodb-stats-persistent=0 \
            --innodb-buffer-pool-size=64M --innodb-log-file-size=32M \
            --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
            --log-error="$DIR/log/mariadbd.log" </dev/null >/dev/null 2>&1 &
        wait_for 15 test -S "$DIR/run/mysql.sock" -a -s "$DIR/run/mariadbd.pid" ||
            die "mariadbd does not start, see $DIR/log/mariadbd.log"
    fi
    if ! alive slurmdbd slurmdbd; then
        clean_env slurmdbd
    fi
    wait_for 15 clean_env timeout 3 sacctmgr -n show cluster || die "slurmdbd does not answer, see $DIR/log/slurmdbd.log"
    if [[ -z $(clean_env sacctmgr -nP show cluster format=cluster) ]]; then
        clean_env sacctmgr -i add cluster lab >/dev/null
    fi
}

start_slurmctld() {
    alive slurmctld slurmctld || clean_env slurmctld -f "$CONF" 2>>"$DIR/log/slurmctld.err"
    wait_for 10 controller_up || die "slurmctld does not answer, see $DIR/log/slurmctld.log"
}
controller_up() { clean_env timeout 3 scontrol ping | grep -q 'is UP'; }

start_slurmd() {
    alive "slurmd.$1" slurmd || clean_env slurmd -N "$1" -f "$CONF" 2>>"$DIR/log/slurmd.err"
}

# node_up NODE: slurmctld reports a usable state, with no flag for a node that
# has not registered or does not answer.
node_up() { [[ $(clean_env sinfo -h -n "$1" -p main -o %T) =~ ^(idle|mixed|allocated|completing)\+?$ ]]; }

wait_nodes() {
    local n
    for n in "$@"; do
        wait_for 15 node_up "$n" || die "$n does not come up, see $DIR/log/slurmd.$n.log"
    done
}

remove_hosts() {
    grep -qsF "$HOSTS_TAG" /etc/hosts || return 0
    local rest
    rest=$(grep -vF "$HOSTS_TAG" /etc/hosts)
    printf '%s\n' "$rest" >/etc/hosts
}

cmd_install() {
    local want=(munge slurm-client slurmctld slurmd)
    if ((ACCOUNTING)); then want+=(slurmdbd mariadb-server-core); fi
    local missing=() p
    for p in "${want[@]}"; do
        dpkg-query -W -f='${db:Status-Abbrev}' "$p" 2>/dev/null | grep -q '^ii' || missing+=("$p")
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    apt-get update -qq
    # policy-rc.d keeps the packages from starting their own daemons.
    local policy=/usr/sbin/policy-rc.d made=0
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; made=1
    fi
    local log=$DIR/log/install.log rc=0
    mkdir -p "$DIR/log"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${missing[@]}" >"$log" 2>&1 || rc=$?
    if ((made)); then rm -f $policy; fi
    ((rc == 0)) || die "apt-get failed, see $log"
}

cmd_start() {
    [[ $(id -u) == 0 ]] || die "must run as root"
    ((${#DIR} <= 60)) || die "$DIR: path too long for the unix sockets under it"
    command -v slurmctld slurmd munged >/dev/null || die "packages missing: run '$0 install'"
    write_config
    start_munged
    start_accounting
    start_slurmctld
    local n
    for n in $(node_names); do start_slurmd "$n"; done
    # shellcheck disable=SC2046
    wait_nodes $(node_names)
    if ((HOSTS)) && ! grep -qsF "$HOSTS_TAG" /etc/hosts; then
        # shellcheck disable=SC2046
        echo "127.0.0.1" $(node_names) "$HOSTS_TAG" >>/etc/hosts
    fi
    say "cluster up: $NODES nodes, $CPUS CPUs and $GPUS GPUs each; eval \"\$($0 env)\""
}

cmd_stop() {
    [[ -d $DIR ]] || return 0
    if controller_up 2>/dev/null; then
        clean_env timeout 10 scancel --quiet --state=PENDING >/dev/null 2>&1 || true
        clean_env timeout 10 scancel --quiet --state=RUNNING >/dev/null 2>&1 || true
        wait_for 3 no_jobs || true
    fi
    terminate slurmctld slurmctld
    local n
    for n in $(node_names); do terminate "slurmd.$n" slurmd; done
    kill_jobs
    terminate slurmdbd slurmdbd
    terminate mariadbd mariadbd
    terminate munged munged
    remove_hosts
}
no_jobs() { [[ -z $(clean_env squeue -h) ]]; }

cmd_status() {
    local bad=0 n
    daemon() {
        if alive "$1" "$2"; then printf '%-14s running  pid %s\n' "$1" "$(cat "$DIR/run/$1.pid")"
        else printf '%-14s stopped\n' "$1"; bad=1; fi
    }
    daemon munged munged
    if ((ACCOUNTING)); then daemon mariadbd mariadbd; daemon slurmdbd slurmdbd; fi
    daemon slurmctld slurmctld
    for n in $(node_names); do daemon "slurmd.$n" slurmd; done
    if controller_up 2>/dev/null; then
        clean_env sinfo -N -o '%8N %8P %12T %5c %7m %G'
        clean_env squeue
        for n in $(node_names); do node_up "$n" || bad=1; done
    else
        bad=1
    fi
    return $bad
}

cmd_env() { printf 'export SLURM_CONF=%q\n' "$CONF"; }

check_node() { node_names | grep -qxF "${1:-}" || die "no such node: ${1:-}"; }

cmd_fail() {
    check_node "${1:-}"
    local pid
    if alive "slurmd.$1" slurmd; then
        pid=$(cat "$DIR/run/slurmd.$1.pid")
        kill -KILL "$pid"
        wait_for 2 gone "$pid" || true
    fi
    rm -f "$DIR/run/slurmd.$1.pid"
    kill_jobs "$1"
}

cmd_heal() {
    check_node "${1:-}"
    start_slurmd "$1"
    wait_nodes "$1"
}

main() {
    local verb=${1:-}
    shift || true
    load_settings
    case $verb in
        install) cmd_install ;;
        start) cmd_start ;;
        stop) cmd_stop ;;
        status) cmd_status ;;
        env) cmd_env ;;
        run) export SLURM_CONF="$CONF"; exec "$@" ;;
        fail) cmd_fail "$@" ;;
        heal) cmd_heal "$@" ;;
        purge) cmd_stop; rm -rf "$DIR" ;;
        *) sed -n '2,32s/^# \{0,1\}//p' "$0"; [[ $verb == help || $verb == -h || $verb == --help ]] ;;
    esac
}

main "$@"
