"""`python -m anymask` and the `anymask` command."""

import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from anymask.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"anymask: the command line needs {error.name}: pip install 'anymask[demo]'")
    app(prog_name="anymask")


if __name__ == "__main__":
    main()
