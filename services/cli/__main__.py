"""The `interlock` command. Owns: the way from the arguments to a command, and the exit codes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from services.cli.failure import CommandFailed
from services.cli.parser import build


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 when it worked, 1 when it failed; argparse exits with 2 on misuse."""
    arguments, unknown = build().parse_known_args(argv)
    if unknown:
        # By the command's own parser, whose usage shows what it takes; argparse would show the first one's.
        arguments.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    # Only the module of this command is imported: `interlock token` must not wait for the rest.
    module = importlib.import_module(f"services.cli.{arguments.module}")
    try:
        code: int = getattr(module, arguments.function)(arguments)
    except CommandFailed as error:
        print(f"interlock: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interlock: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more at its end.
        sys.stderr.close()
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"interlock: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
