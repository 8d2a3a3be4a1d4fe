#!/usr/bin/env bash
# Runs Envoy, which a signal ends at once, so that SIGTERM and SIGINT drain it first.
#
#   drained.sh ADMIN_PORT SECONDS NOTICE_SECONDS ENVOY [ARGUMENTS...]
#
# For containers: their engine says by a signal, and by nothing else, that the end comes. It ends as Envoy does.
set -euo pipefail

drain=("${BASH_SOURCE[0]%/*}/drain.sh" "$1" "$2" "$3")
shift 3

end() {
  # Told once more, it does not begin anew.
  trap '' TERM INT
  # Whether all has ended, the time is over, or Envoy is not there yet: now it goes.
  "${drain[@]}" || true
  kill -TERM "$!" || true
  status=0
  wait "$!" || status=$?
  exit "$status"
}

trap end TERM INT
"$@" &
wait "$!"
