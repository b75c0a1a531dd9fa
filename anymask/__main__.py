"""`python -m anymask` and the `anymask` command."""

import codecs
import io
import sys

# what is printed where a terminal, or a file, has no such character
PLAIN = {"█": "#", "░": "+", "·": ".", "…": "...", "×": "x", "•": "*", "│": "|"}


def main() -> None:
    """Run the command line, or say which extra it needs."""
    print_in_any_encoding()
    try:
        from anymask.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"anymask: the command line needs {error.name}: pip install typer rich")
    app(prog_name="anymask")


def print_in_any_encoding() -> None:
    """Let stdout print something like a character that its encoding lacks, in place of an error."""
    codecs.register_error("anymask", _plainer)
    # another way of handling errors is somebody's choice
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="anymask")


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    # box-drawing lines, or whatever was not foreseen
    return "".join(PLAIN.get(c, "-" if "─" <= c <= "╿" else "?") for c in characters), error.end


if __name__ == "__main__":
    main()
