#!/usr/bin/env bash
# Asks with grpcurl, which learns the contract from the mesh itself; Ctrl-C ends the request in the mesh too.
#
#   grpcurl.sh HOST:PORT TOKEN PROMPT [MAX_TOKENS] [DEADLINE_SECONDS]
#
# It takes $GRPCURL, the grpcurl of the search path, or that which `make install` puts into the checkout's .venv.
set -euo pipefail

address=$1 token=$2 prompt=$3 max_tokens=${4:-50} deadline=${5:-240}

body=$(PROMPT=$prompt MAX_TOKENS=$max_tokens python3 -c '
import json, os
print(json.dumps({"text": os.environ["PROMPT"], "max_tokens": int(os.environ["MAX_TOKENS"])}))')

grpcurl=${GRPCURL:-$(command -v grpcurl || echo "$(dirname "$0")/../.venv/bin/grpcurl")}

exec "${grpcurl}" -plaintext -max-time "${deadline}" \
  -H "authorization: Bearer ${token}" -d "${body}" \
  "${address}" interlock.v1.GatewayService/Generate
