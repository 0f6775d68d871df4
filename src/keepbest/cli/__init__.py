"""The command line: `keepbest COMMAND`, or `python -m keepbest COMMAND`. It needs the extra `cli`."""
