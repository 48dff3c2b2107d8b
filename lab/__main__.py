"""`python -m lab COMMAND`: what can be done with the folder of a sweep, or with a file before it is run."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from core.yaml_files import ConfigError

OK, FAILED, WRONG = 0, 1, 2

# Each command is a module with ABOUT, arguments(parser) and act(given), which returns the exit code. Only the one that is asked for
# is imported.
COMMANDS = {
    "status": ("lab.status", "how far every run is"),
    "report": ("lab.anew", "write the leaderboard, plots and page anew"),
    "compare": ("lab.compare", "the cells of several sweeps in one table"),
    "retry": ("lab.retry", "let failed runs be tried again"),
    "check": ("lab.check", "build every model of a file, run two steps, and say what differs"),
    "import": ("lab.importing", "turn an exploration file of ReaLLM-Forge into one of ours"),
    "sync": ("lab.sync", "upload the runs of a sweep to W&B"),
}


def main(words: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 it could not be done, 2 what was given is wrong."""
    parser = argparse.ArgumentParser(prog="python -m lab", description="Works on a sweep.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), None)
    for command, (module, about) in COMMANDS.items():
        one = commands.add_parser(command, help=about, description=about)
        if command == asked:
            importlib.import_module(module).arguments(one)
    given = parser.parse_args(words)
    try:
        code = int(importlib.import_module(COMMANDS[given.command][0]).act(given))
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print("\n".join(error.sentences), file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
