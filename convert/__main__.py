"""`python -m convert COMMAND`: weights in and out."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

OK, DIFFERENT, WRONG, STOPPED = 0, 1, 2, 75

# Each command is a module with arguments(parser) and act(given), which returns the exit code. Only the one that is asked for is
# imported.
COMMANDS = {
    "import": ("convert.commands.importing", "a model or adapters of another tool as a run folder"),
    "export": ("convert.commands.exporting", "a run's model or adapters for other tools"),
    "reshard": ("convert.commands.resharding", "the files of parallel ranks, for other numbers of them"),
    "check": ("convert.commands.checking", "whether two checkpoints hold the same weights"),
    "effective": (
        "convert.commands.effective",
        "write every weight as what multiplies: of a PKL weight a + scale * b, adapters merged; also embedding and head",
    ),
    "adapters": ("convert.commands.adapters", "write the adapters alone, each tensor under its address"),
}


def main(words: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 where two checkpoints differ, 2 where what was given cannot be converted, 75 stopped."""
    parser = argparse.ArgumentParser(prog="python -m convert", description="Weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), None)
    for command, (module, about) in COMMANDS.items():
        one = commands.add_parser(command, help=about, description=about)
        if command == asked:
            importlib.import_module(module).arguments(one)
    given = parser.parse_args(words)
    try:
        return int(importlib.import_module(COMMANDS[given.command][0]).act(given))
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG
    except OSError as error:
        print(f"{error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("stopped. Nothing of it was kept.", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
