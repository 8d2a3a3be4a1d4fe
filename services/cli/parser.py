"""The arguments of every command. Owns: names, defaults and help; imports nothing heavy.

A command names the module and the function that run it; `__main__` imports that module alone.
"""

from __future__ import annotations

import argparse
from typing import TypeAlias

from services.cli.values import count_of, duration_s, path, port, words

_DESCRIPTION = """\
Interlock serves a language model on your own machines, as a mesh of small services.

  interlock up                              start everything on this machine
  interlock chat "Why is the sky blue?"     ask the model
  interlock status                          what runs, and where
  interlock down                            stop everything
"""

_EPILOG = """\
A local mesh lives in $INTERLOCK_HOME (default .interlock): its state, logs, secrets and models.
With $INTERLOCK_URL and $INTERLOCK_TOKEN, chat, models, rollouts, workers, breakers and token revoke are about
the mesh there (https: by the machine's authorities, or those in $INTERLOCK_CA_FILE), not about the home's.
Exit codes: 0 it worked, 1 it failed, 2 it was called wrongly.
"""

QUANTIZATIONS = ("auto", "none", "int8", "nf4", "fp4")
DTYPES = ("auto", "fp32", "bf16")
SCOPES = ("generate", "models:read", "admin", "priority:system")

# Each process takes a core or a gigabyte; beyond this a typing error is likelier than a wish.
_count = count_of(64)
# No machine makes a billion tokens a minute; more digits are a typing error.
_LIMIT_MAX = 1_000_000_000

# What argparse returns for commands; it has no public name.
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - see above


def build() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="interlock",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(refuse=parser.error)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_up, _down, _status, _token, _chat, _models, _rollouts, _workers, _breakers, _envoy, _bench):
        add(commands)
    return parser


def _command(
    commands: _Commands, name: str, summary: str, *, run: str, examples: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module, _, function = run.partition(":")
    parser.set_defaults(module=module, function=function or "run", refuse=parser.error)
    # How argparse reads an argument without a type.
    parser.register("type", None, words)
    return parser


def _group(commands: _Commands, name: str, summary: str) -> _Commands:
    group = commands.add_parser(name, help=summary, description=summary)
    return group.add_subparsers(metavar="COMMAND", required=True)


def _up(commands: _Commands) -> None:
    parser = _command(
        commands,
        "up",
        "Start the whole mesh on this machine; Ctrl-C stops it.",
        run="up",
        examples="""\
  interlock up                                  the demo model, fetched at the first time
  interlock up --workers 2 --quantization int8  two workers with eight-bit weights
  interlock up --model ./my-model --detach      a directory in Hugging Face format, in the background
  interlock up --port 0                         beside another mesh, on free ports""",
    )
    parser.add_argument("--workers", type=_count, default=1, metavar="N", help="workers (%(default)s)")
    parser.add_argument("--gateways", type=_count, default=1, metavar="N", help="gateways (%(default)s)")
    parser.add_argument(
        "--controllers",
        type=_count,
        default=1,
        metavar="N",
        help="controllers; one leads, the others stand by (%(default)s)",
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        metavar="NAME|PATH",
        help="a model to fetch, or a directory in Hugging Face format (%(default)s)",
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="of the weights")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the computation")
    parser.add_argument(
        "--worker-memory-bytes",
        type=count_of(1 << 50),
        default=0,
        metavar="B",
        help="what a worker's weights may take; decides how a rollout goes (the machine's memory)",
    )
    parser.add_argument(
        "--port",
        type=port,
        default=8080,
        help="for clients; 0 takes free ports for everything (%(default)s)",
    )
    parser.add_argument("--detach", action="store_true", help="return when it is ready, and leave it running")


def _down(commands: _Commands) -> None:
    _command(commands, "down", "Stop the mesh of this home.", run="down")


def _status(commands: _Commands) -> None:
    parser = _command(
        commands,
        "status",
        "Show what runs, and where.",
        run="status",
        examples="""\
  interlock status                   processes and breakers, once; 1 when one is down or serves nothing
  interlock status --watch           queue, routes and workers too, anew each second until Ctrl-C
  interlock status --watch --json    the same, one JSON object a line
""",
    )
    parser.add_argument("--watch", action="store_true", help="show it anew each second, until Ctrl-C")
    _add_json(parser)


def _token(commands: _Commands) -> None:
    parser = _command(
        commands,
        "token",
        "Print a bearer token for the mesh of this home, or of $INTERLOCK_JWT_SECRET, or take one back.",
        run="token",
        examples="""\
  interlock token                                          every scope, eight hours
  interlock token --sub alice --scope generate --ttl 15m   for somebody else
  interlock token --sub batch --weight 3 --concurrency 8   with limits, which the gateway's own bound
  INTERLOCK_JWT_SECRET=... interlock token --sub ops       for services with that secret; needs no home
  interlock token revoke "$TOKEN"                          refused everywhere within five seconds
  interlock token --key signer.pem                         for services that check RS256, ES256 or EdDSA
  interlock token jwks signer.pem > jwks.json              what those services are given as jwt_jwks
  curl -H "authorization: Bearer $(interlock token)" http://127.0.0.1:8080/v1/admin/workers""",
    )
    parser.add_argument("--sub", default="local", help="whom it is for: the tenant (%(default)s)")
    parser.add_argument("--scope", default=" ".join(SCOPES), help='what it allows ("%(default)s")')
    parser.add_argument("--ttl", type=duration_s, default="8h", help="how long, at most 24h (%(default)s)")
    _token_limits(parser)
    parser.add_argument("--jti", metavar="ID", help="name to revoke it by (a random one)")
    parser.add_argument(
        "--key",
        type=path,
        metavar="FILE",
        help="private key (PEM) to sign with, in the place of the home's secret",
    )
    parser.add_argument(
        "--issuer", metavar="NAME", help="its iss (interlock; elsewhere $INTERLOCK_JWT_ISSUER)"
    )
    parser.add_argument(
        "--audience", metavar="NAME", help="its aud (interlock; elsewhere $INTERLOCK_JWT_AUDIENCE)"
    )
    inner = parser.add_subparsers(metavar="[revoke|jwks]")
    # It sees all that follows, which the inner command reads by its own types.
    inner.type = path
    revoke = _command(
        inner,
        "revoke",
        "Take a token back before its end.",
        run="revoke",
        examples="""\
  interlock token revoke eyJhbGciOi...   by the token itself: only its jti is sent
  interlock token revoke 3f2a9c...       by its jti
  interlock token revoke --id team.7     by a jti with a dot in it""",
    )
    revoke.add_argument("token", metavar="TOKEN|JTI", help="the token, or its jti")
    revoke.add_argument("--id", action="store_true", help="it is a jti, although it looks like a token")
    keys = _command(inner, "jwks", "Print the JWK set of private keys' public halves.", run="token:key_set")
    keys.add_argument("keys", nargs="+", type=path, metavar="FILE", help="private key (PEM)")


def _token_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits", "What the tenant may use, within the gateways' own bounds.")
    limits.add_argument(
        "--tokens-per-minute", type=count_of(_LIMIT_MAX), metavar="N", help="of prompt and output together"
    )
    limits.add_argument("--concurrency", type=count_of(_LIMIT_MAX), metavar="N", help="requests at once")
    limits.add_argument(
        "--weight", type=count_of(100), metavar="N", help="share of a busy mesh, relative to other tenants"
    )


def _chat(commands: _Commands) -> None:
    parser = _command(
        commands,
        "chat",
        "Talk with the model; without a prompt, in a conversation.",
        run="chat",
        examples="""\
  interlock chat "Name three rivers."
  interlock chat                        a conversation; Ctrl-D ends it""",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="one question; absent: a conversation")
    parser.add_argument("--model", help="name of a model (the mesh's default)")
    parser.add_argument(
        "--max-tokens",
        type=count_of(1_000_000),
        default=256,
        metavar="N",
        help="longest answer (%(default)s)",
    )


def _models(commands: _Commands) -> None:
    inner = _group(commands, "models", "List, fetch, upload or delete models.")
    _add_json(_command(inner, "list", "Show the models that the mesh serves.", run="models:list_models"))
    fetch = _command(
        inner,
        "fetch",
        "Fetch a model to this machine, once.",
        run="models:fetch",
        examples="  interlock models fetch smollm2-135m-instruct",
    )
    fetch.add_argument(
        "name", nargs="?", default="smollm2-135m-instruct", metavar="NAME", help="(%(default)s)"
    )

    push = _command(
        inner,
        "push",
        "Upload a directory as a revision; what is there already is not sent again.",
        run="push:push",
        examples="""\
  interlock models push ./my-model --revision v2
  interlock models push ./my-model --golden golden.json   [{"text": "2 + 2 =", "expected": "4"}]
  interlock models push ./my-model --revision v2-int8 --quantization int8   sends nothing but the manifest""",
    )
    push.add_argument("path", type=path, metavar="PATH", help="a directory in Hugging Face format")
    push.add_argument("--name", metavar="N", help="model that it is a revision of (the mesh's default)")
    push.add_argument("--revision", default="", metavar="R", help="its name (a digest of its content)")
    push.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="of the weights")
    push.add_argument("--dtype", choices=DTYPES, default="auto", help="of the computation")
    push.add_argument("--context-tokens", type=count_of(1 << 24), metavar="N", help="(the model's)")
    push.add_argument(
        "--golden",
        type=path,
        metavar="FILE",
        help="JSON list of prompts that it must answer before it may serve",
    )
    push.add_argument(
        "--fallback-model",
        default="",
        metavar="NAME",
        help="another mesh's model, which gateways ask when no worker can (none)",
    )
    _add_json(push)
    remove = _command(
        inner, "rm", "Delete a revision.", run="push:remove", examples="  interlock models rm my-model@v1"
    )
    remove.add_argument("revision", metavar="MODEL@REVISION", help="as `interlock models revisions` names it")
    revisions = _command(
        inner, "revisions", "Show the revisions of a model, newest first.", run="push:list_revisions"
    )
    revisions.add_argument("name", nargs="?", metavar="NAME", help="(the mesh's default)")
    _add_json(revisions)


def _rollouts(commands: _Commands) -> None:
    inner = _group(commands, "rollouts", "Replace the revision that serves, with nothing dropped.")
    start = _command(
        inner,
        "start",
        "Prepare a revision on all workers, switch to it, and judge it.",
        run="rollouts:start",
        examples="""\
  interlock rollouts start smollm2-135m-instruct v2 --watch
  interlock rollouts start smollm2-135m-instruct v2 --canary 10 --bake 5m   a tenth of the requests at first
  interlock rollouts start smollm2-135m-instruct v2 --strategy swap         where memory holds one copy""",
    )
    start.add_argument("model", metavar="MODEL", help="the model to update")
    start.add_argument(
        "revision", metavar="REVISION", help="what shall serve; see `interlock models revisions`"
    )
    start.add_argument(
        "--strategy", choices=("auto", "side-by-side", "swap"), default="auto", help="(%(default)s)"
    )
    start.add_argument(
        "--canary",
        type=count_of(100),
        default=100,
        metavar="PERCENT",
        help="share while judged (%(default)s); by swap always 100",
    )
    start.add_argument("--bake", type=duration_s, default="60s", help="how long it is judged (%(default)s)")
    start.add_argument(
        "--quorum",
        type=count_of(10_000),
        metavar="N",
        help="workers that must be ready; more than there are: all (all)",
    )
    start.add_argument(
        "--max-failed",
        type=count_of(100, least=0),
        metavar="PERCENT",
        help="of its attempts that may fail beyond the old revision's; 100: any (5)",
    )
    start.add_argument(
        "--max-ttft",
        type=count_of(100, least=0),
        metavar="TIMES",
        help="as long as the old revision's its first tokens may take; 0: any (3)",
    )
    start.add_argument("--watch", action="store_true", help="show it until its end")
    for name, text in (
        ("watch", "Show a rollout until its end."),
        ("promote", "End the judging: the new revision stays."),
        ("rollback", "Give everything back to the old revision."),
        ("cancel", "End a rollout, wherever it is."),
        ("pause", "Hold a rollout: it does not switch, and its judging does not end."),
        ("resume", "Let a rollout that was held go on."),
    ):
        parser = _command(inner, name, text, run=f"rollouts:{name}")
        parser.add_argument("id", nargs="?", metavar="ID", help="(the newest)")
        _add_json(parser)
    _add_json(start)
    _add_json(_command(inner, "list", "Show rollouts, newest first.", run="rollouts:list_rollouts"))


def _workers(commands: _Commands) -> None:
    inner = _group(commands, "workers", "List workers, or take one out of service.")
    _add_json(_command(inner, "list", "Show the workers of the mesh.", run="workers:list_workers"))
    drain = _command(
        inner,
        "drain",
        "Take a worker out of service: it ends what it runs, and gets nothing more until it is restarted.",
        run="workers:drain",
        examples="  interlock workers drain worker-1   with 0 RUNNING its process may end",
    )
    drain.add_argument("id", metavar="ID", help="as `interlock workers list` names it")
    _add_json(drain)


def _breakers(commands: _Commands) -> None:
    inner = _group(commands, "breakers", "List circuit breakers, or hold them.")
    _add_json(_command(inner, "list", "Show the breakers of all gateways.", run="breakers:list_breakers"))
    force = _command(
        inner,
        "force",
        "Hold the breakers of a worker, or of the store, until they are released.",
        run="breakers:force",
        examples="""\
  interlock breakers force worker-1 open     no gateway sends it anything
  interlock breakers force store closed      ask Redis whatever happens
  interlock breakers release worker-1""",
    )
    release = _command(inner, "release", "Let the breakers of a target go.", run="breakers:release")
    for parser in (force, release):
        parser.add_argument("target", metavar="TARGET", help="a worker's id, or `store`")
        _add_json(parser)
    force.add_argument("state", choices=("open", "closed"), help="what they are held in")


def _envoy(commands: _Commands) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "envoy", help="Print an Envoy configuration for a mesh.", add_help=False, prefix_chars=" "
    )
    # The generator has its own arguments and help.
    parser.add_argument("rest", nargs="*")
    parser.set_defaults(module="envoy", function="run")


def _bench(commands: _Commands) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench", help="Measure; alone, list what can be measured.", add_help=False, prefix_chars=" "
    )
    # Each measurement has its own arguments and help.
    parser.add_argument("rest", nargs="*")
    parser.set_defaults(module="bench", function="run")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
