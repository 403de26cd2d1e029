#!/usr/bin/env bash
set -euo pipefail

AUTOGROUP=/proc/sys/kernel/sched_autogroup_enabled

usage() {
    cat <<'TEXT'
Hosts on this machine that are connected by network and ssh only: hv1, hv2, ... with the addresses
10.78.0.1, 10.78.0.2, ... Each has its own network (eth0), host name, processes and mounts. Files are
shared, except where a host mounts something over them.

  hosts.sh check           print the reason why hosts cannot be created here, if any
  hosts.sh up N DIR        create N hosts with keys in DIR; they exist until standard input closes
  hosts.sh run DIR I CMD   run a command on host I

  hosts.sh run DIR 2 mount -t tmpfs none /data       host 2 does not see /data
  hosts.sh run DIR 2 ip link set eth0 down           host 2 loses its network
  hosts.sh run DIR 2 bash -c 'kill -9 -1'            kills all programs of host 2 and restarts it

Needs root, iproute2, openssh-server, openssh-client and util-linux. While hosts exist, the
kernel's scheduling by session (kernel.sched_autogroup_enabled) is off.
TEXT
}

fail() {
    printf 'hosts.sh: %s\n' "$1" >&2
    exit 1
}

require() {
    local missing=() pair
    for pair in ip:iproute2 sshd:openssh-server ssh:openssh-client ssh-keygen:openssh-client \
        unshare:util-linux nsenter:util-linux; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -eq 0 ] || fail "missing: apt-get install ${missing[*]}"
    [ "$(id -u)" = 0 ] || fail "only root can create networks"
    unshare --net --uts --mount --pid --fork \
        bash -c 'ip link add switch type bridge && ip link add one type veth peer name two' \
        2>/dev/null || fail "networks cannot be created here; run a container privileged"
}

# The first process of the namespaces that an unshare has made.
child() {
    local found=
    for _ in $(seq 100); do
        read -r found _ 2>/dev/null <"/proc/$1/task/$1/children" || true
        [ -z "$found" ] || break
        sleep 0.05
    done
    [ -n "$found" ] || fail "a namespace could not be made"
    echo "$found"
}

on() { # on I COMMAND...
    nsenter --target "$(cat "$dir/hv$1")" --net --uts --mount --pid env -C "$PWD" "${@:2}"
}

# With 0, ranks that wait yield their core to those of other hosts too, not to their own session's alone:
# all hosts share this machine's cores, and a step under mpirun can take seconds without it.
group_sessions() {
    [ ! -e "$AUTOGROUP" ] || echo "$1" 2>/dev/null >"$AUTOGROUP" || true
}

await() { # await I J: until host I answers host J
    for _ in $(seq 200); do
        if on "$2" ssh -o BatchMode=yes "hv$1" true 2>/dev/null; then return; fi
        sleep 0.1
    done
    fail "hv$1 does not answer"
}

up() {
    local count=$1 home i pid switch
    require
    home=$(getent passwd root | cut -d: -f6)
    mkdir -p "$dir/ssh" /run/sshd "$home/.ssh" # the hosts mount their own over this
    rm -f "$dir"/hv* "$dir"/ssh/*
    ssh-keygen -q -t ed25519 -N '' -f "$dir/ssh/id"
    cp "$dir/ssh/id.pub" "$dir/ssh/authorized_keys"
    cat >"$dir/ssh/config" <<TEXT
IdentityFile $dir/ssh/id
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
TEXT
    cat >"$dir/sshd" <<TEXT
HostKey $dir/ssh/id
AuthorizedKeysFile $dir/ssh/authorized_keys
StrictModes no
PermitRootLogin yes
PidFile none
TEXT
    [ -z "${PYTHONPATH:-}" ] || echo "SetEnv PYTHONPATH=$PYTHONPATH" >>"$dir/sshd"
    echo '127.0.0.1 localhost' >"$dir/hosts"
    for i in $(seq "$count"); do echo "10.78.0.$i hv$i" >>"$dir/hosts"; done

    # All that is made below lasts as long as these processes do, networks and mounts included.
    pids=()
    trap 'kill -KILL "${pids[@]}" 2>/dev/null || true; group_sessions "$grouped"' EXIT
    grouped=$(cat "$AUTOGROUP" 2>/dev/null || true)
    group_sessions 0
    unshare --net --fork --kill-child=KILL sleep infinity &
    pids+=($!)
    switch=$(child $!)
    nsenter --target "$switch" --net ip link add switch type bridge
    nsenter --target "$switch" --net ip link set switch up
    for i in $(seq "$count"); do
        unshare --net --uts --mount --pid --fork --kill-child=KILL --mount-proc \
            "${BASH_SOURCE[0]}" boot "$dir" "$i" "$home" </dev/null &
        pids+=($!)
        pid=$(child $!)
        nsenter --target "$switch" --net ip link add "hv$i" type veth peer name eth0 netns "$pid"
        nsenter --target "$switch" --net ip link set "hv$i" master switch up
        nsenter --target "$pid" --net ip addr add "10.78.0.$i/24" dev eth0
        nsenter --target "$pid" --net ip link set eth0 up
        echo "$pid" >"$dir/hv$i"
    done
    for i in $(seq "$count"); do await "$i" $((i % count + 1)); done
    echo "up"
    cat >/dev/null
}

# The first process of a host; it also collects what ended without a parent.
boot() {
    hostname "hv$1"
    mount --bind "$dir/ssh" "$2/.ssh"
    mount --bind "$dir/hosts" /etc/hosts
    ip link set lo up
    while true; do
        /usr/sbin/sshd -D -f "$dir/sshd" || true
        sleep 0.05
    done
}

export PATH=$PATH:/usr/sbin:/sbin
case ${1:-} in
    up)
        dir=$(realpath -m "$3")
        up "$2"
        ;;
    run)
        dir=$2
        on "${@:3}"
        ;;
    check) require ;;
    boot)
        dir=$2
        boot "${@:3}"
        ;;
    *)
        usage
        exit 2
        ;;
esac
