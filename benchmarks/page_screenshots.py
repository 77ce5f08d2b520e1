"""Take pictures of the page of a model in a browser, at two widths, light and dark.

    python benchmarks/page_screenshots.py MODEL [--name NAME] [--targets T] [--out FOLDER]

Writes page_NAME_{laptop,phone}_{light,dark}.png. Needs Chromium. Ends with an error if the page
makes a network request, violates its own content security policy, throws an exception or is wider
than the window.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from itertools import product
from pathlib import Path

from browser import Browser, find_chromium
from common import say
from PIL import Image

import emp_llm
from emp_llm.report.page.page import write_page

WINDOWS = {"laptop": (1440, 1440, 1.0), "phone": (390, 1560, 1.5)}
"""Width and height in CSS pixels, and device pixels in each of them."""


def save(picture: bytes, path: Path) -> None:
    """Write a PNG with a palette: a quarter of the bytes, and flat colours lose nothing."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Inspect a model, write its page and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--name", help="NAME in the file names; by default the model's")
    parser.add_argument("--targets", default="mlp")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        sys.exit("no Chromium found; install one, for example with apt")
    report = emp_llm.inspect(arguments.model, emp_llm.PruneOptions(targets=arguments.targets))
    name = arguments.name or Path(arguments.model).name
    with tempfile.TemporaryDirectory() as folder, Browser(executable) as browser:
        page = Path(folder) / "page.html"
        write_page(report, page, model=name)
        for (window, (width, height, scale)), theme in product(WINDOWS.items(), ("light", "dark")):
            browser.look(width, height, dark=theme == "dark", scale=scale)
            browser.open(page)
            assert browser.run("document.documentElement.scrollWidth") == width
            path = arguments.out / f"page_{name}_{window}_{theme}.png"
            save(browser.screenshot(), path)
            say(f"{path}: {path.stat().st_size:,} bytes")
        faults = browser.faults()
    assert not faults, faults
    say(f"the page of {name}: no request, no exception, no policy violation")


if __name__ == "__main__":
    main()
