"""The command line: `python -m keepbest COMMAND`. It needs the extra `cli`."""
