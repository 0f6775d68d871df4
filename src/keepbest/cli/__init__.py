"""The command line: `python -m keepbest train | eval | show`. Needs the extra `cli`."""
