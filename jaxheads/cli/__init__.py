"""The `jaxheads` command: one file per subcommand.

Nothing here imports JAX until a command runs, so that help and typing errors come at once.
"""

from jaxheads.cli.app import main

__all__ = ["main"]
