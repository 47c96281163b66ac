"""The command line: `lightning-influence info | verify | top | self-influence | export FILE`."""

from lightning_influence.cli.main import main

__all__ = ["main"]
