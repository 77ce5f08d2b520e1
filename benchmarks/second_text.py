"""Writes a text that every Python brings along: the beginning of the language reference.

    python benchmarks/second_text.py reference.txt

Technical prose with examples of code, unlike the encyclopedia that models are usually calibrated
on. It is what ``help()`` shows on keywords and concepts, from the standard library's
``pydoc_data``, topic by topic in the order of their names, and cut at 100,000 bytes. The text
depends on the version of CPython; equal hashes, which are printed, mean equal texts.
"""

from __future__ import annotations

import argparse
import platform
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics

BYTES = 100_000


def main() -> None:
    """Read the command line, write the file and print what it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="the file to write")
    out = parser.parse_args().out
    text = second_text().encode()
    out.write_bytes(text)
    hashed = sha256(text).hexdigest()
    print(f"{out}: {len(text)} bytes of Python {platform.python_version()}, sha256 {hashed}")


def second_text() -> str:
    """The text; as UTF-8 it takes 100,000 bytes, or less where a character would be cut."""
    whole = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return whole.encode()[:BYTES].decode(errors="ignore")


if __name__ == "__main__":
    main()
