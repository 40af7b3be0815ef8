"""What the console that a program writes to can show."""

from io import TextIOWrapper

from rich.console import Console


def is_plain(console: Console) -> bool:
    """Whether the output has no styles."""
    return console.color_system is None


def replace_unencodable(console: Console) -> None:
    """Write characters that the encoding of the output lacks as question marks, instead of failing on them."""
    if isinstance(console.file, TextIOWrapper):
        console.file.reconfigure(errors="replace")
