"""`python -m keepbest`, also under torchrun and srun, and the installed command `keepbest`."""

from __future__ import annotations

import sys

_PACKAGES_OF_THE_EXTRA = ("typer", "rich", "yaml")


def main() -> None:
    """Run the command line, or exit with a message about how to install what it needs."""
    try:
        from keepbest.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES_OF_THE_EXTRA:
            raise
        sys.exit(f"the command line needs the package {error.name!r}; install it with: pip install 'keepbest[cli]'")
    app(prog_name="keepbest")


if __name__ == "__main__":
    main()
