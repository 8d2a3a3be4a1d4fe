"""The trial of a tokenizer, run as a program of its own. Owns: the bounds of time and memory for reading it.

The library holds the interpreter while it reads: a large file would make the whole controller stand still for
longer than its lease lasts, and a hostile one could fill its memory or end its process.

Argument: the revision's directory. It ends with 0 where gateways and workers can read the tokenizer and its
template, and with `FLAWED` after it has said on standard output what is wrong.
"""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

from services.common.errors import ArtifactInvalid
from services.common.hf_tokenizer import HfTokenizer

# An exit status that Python itself never has.
FLAWED = 3

# The largest tokenizers in use take ten seconds of a core, and 1.5 GB while they are read.
CPU_LIMIT_S = 60
MEMORY_BYTES_MAX = 4 << 30
# On a machine that is busy otherwise; also the end of a trial whose controller has died.
LIMIT_S = 180


def main() -> None:
    """Reads the tokenizer of the directory that is named."""
    signal.alarm(LIMIT_S)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        HfTokenizer.load(Path(sys.argv[1]))
    except ArtifactInvalid as error:
        sys.stdout.write(error.message)
        sys.exit(FLAWED)


if __name__ == "__main__":
    main()
