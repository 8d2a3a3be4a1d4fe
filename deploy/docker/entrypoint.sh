#!/bin/sh
# Starts one service under the name of its container; settings that are given win.
#
#   entrypoint.sh SERVICE PORT [ARGUMENTS...]
set -eu

service=$1 port=$2
shift 2
prefix=INTERLOCK_$(echo "$service" | tr '[:lower:]' '[:upper:]')

default() { # NAME VALUE: exports it unless it is set
  eval "export ${prefix}_$1=\"\${${prefix}_$1:-\$2}\""
}

default ID "$(hostname)"
# A worker tells the mesh the address that it binds, so it binds its container's own. The others are found
# by name, on each network that they are in.
case "$service" in
  worker) default BIND "$(hostname -i | cut -d ' ' -f 1):${port}" ;;
  *) default BIND "0.0.0.0:${port}" ;;
esac

exec python -m "services.${service}" "$@"
