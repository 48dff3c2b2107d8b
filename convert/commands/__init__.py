"""The commands of `python -m convert`: each a module with arguments(parser) and act(given), which returns the exit code."""
