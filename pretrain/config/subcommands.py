"""Commands with a second word, as in `bd3 convert export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bd3_common.errors import ConfigError
from bd3_common.exit_codes import USAGE_ERROR
from pretrain.config.values import did_you_mean, show

Subcommand = Callable[[list[str]], int | None]


def run_subcommand(
    prog: str, kind: str, commands: Mapping[str, Subcommand], usage: Callable[[], str], args: list[str]
) -> int:
    """Run the command that the first argument names, with the arguments after it; the exit code.

    Without an argument, or for ``--help``, the usage is printed.

    Args:
        kind: what the second word names, for the message about an unknown one.

    Raises:
        ConfigError: no such command.
    """
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else USAGE_ERROR
    name, *rest = args
    if name not in commands:
        near = did_you_mean(name, commands) or f"; use {', '.join(commands)}"
        raise ConfigError(f"{prog} {show(name)}: unknown {kind}{near}")
    return commands[name](rest) or 0
