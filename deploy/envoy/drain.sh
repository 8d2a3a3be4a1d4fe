#!/usr/bin/env bash
# Takes one Envoy out of service: says "not ready", stops taking connections, waits for streams to end.
#
#   drain.sh [ADMIN_PORT] [SECONDS] [NOTICE_SECONDS]      (9901, 30, 5)
#
# For `ExecStop` in systemd; in containers `drained.sh` calls it. It returns 0 when nothing runs any more, 1
# when SECONDS are over before; then whoever called it ends Envoy, and resumable streams go on elsewhere.
# Needs bash and coreutils alone: images with Envoy have no HTTP client.
set -euo pipefail

admin_port=${1:-9901}
seconds=${2:-30}
# Load balancers ask every few seconds; connections that they still send meanwhile are taken.
notice_seconds=${3:-5}
ask_seconds=2

ask() { # METHOD PATH: the reply, its head included
  exec 3<>"/dev/tcp/127.0.0.1/${admin_port}" || return 1
  printf '%s %s HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\nconnection: close\r\n\r\n' "$1" "$2" >&3
  # One that does not answer is not known to be idle, and must not hold anybody either.
  timeout "$ask_seconds" cat <&3 || true
  exec 3>&-
}

running() { # how many requests of clients are under way
  ask GET '/stats?filter=^http.interlock.downstream_rq_active$' |
    sed -n 's/^http\.interlock\.downstream_rq_active: \([0-9]*\).*/\1/p'
}

deadline=$((SECONDS + seconds))
ask POST /healthcheck/fail >/dev/null
while ((SECONDS < deadline && notice_seconds-- > 0)); do sleep 1; done
ask POST '/drain_listeners?graceful&skip_exit' >/dev/null
while
  # Where nobody listens any more, nothing is left to wait for.
  active=$(running) || exit 1
  [[ $active != 0 ]]
do
  ((SECONDS < deadline)) || exit 1
  sleep 0.2
done
