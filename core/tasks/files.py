"""Question files, a line at a time, with the file and line named where one can't be read."""

import os
from collections.abc import Iterator
from pathlib import Path

LONGEST_LINE = 1 << 20  # bytes; the longest of LAMBADA's and the Children's Book Test's has a few thousand


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends. Raises ValueError where one is too long or isn't text."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: more than {LONGEST_LINE:,} bytes: this is no question file")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8 text: {error}") from None
            if "\0" in text:
                raise ValueError(f"{path}, line {number} holds a zero byte: this is no text file")
            if number == 1:
                text = text.removeprefix("\ufeff")  # the byte order mark that some editors write
            yield text.removesuffix("\n").removesuffix("\r")


def is_text(text: str) -> bool:
    """Whether it can be encoded: JSON can say half a surrogate pair, which no UTF-8 has."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def ends_within_a_line(path: Path) -> bool:
    """Whether a file that isn't empty ends without the end of its last line, as one that was cut short does."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
