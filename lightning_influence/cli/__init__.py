"""The command line: `lightning-influence info | verify | top | self-influence | export | merge FILE`."""

from lightning_influence.cli.main import main

__all__ = ["main"]
