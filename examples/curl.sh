#!/usr/bin/env bash
# Asks over HTTP, answer as server-sent events; Ctrl-C ends the request in the mesh too.
#
#   curl.sh HOST:PORT TOKEN PROMPT [MAX_TOKENS] [DEADLINE_SECONDS]
set -euo pipefail

address=$1 token=$2 prompt=$3 max_tokens=${4:-50} deadline=${5:-240}

# JSON is made of the prompt by a tool that knows how; a quotation mark in it would break a template.
body=$(PROMPT=$prompt MAX_TOKENS=$max_tokens python3 -c '
import json, os
print(json.dumps({"text": os.environ["PROMPT"], "max_tokens": int(os.environ["MAX_TOKENS"]), "stream": True}))')

# --fail-with-body: the status becomes curl's exit code, and the error is still printed.
exec curl --silent --show-error --no-buffer --fail-with-body "http://${address}/v1/generate" \
  --header "authorization: Bearer ${token}" \
  --header 'content-type: application/json' \
  --header "x-interlock-deadline: ${deadline}" \
  --data "${body}"
