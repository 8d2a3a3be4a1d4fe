"""`interlock envoy`. Owns: nothing but the way to the generator, with the descriptors where they are."""

from __future__ import annotations

import argparse

from deploy.envoy import generate


def run(arguments: argparse.Namespace) -> int:
    """Prints or writes a configuration."""
    return generate.main(arguments.rest, prog="interlock envoy", descriptors=str(generate.DESCRIPTORS))
