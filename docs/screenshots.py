"""Takes the pictures in docs/images: every view of a report, in both themes and at the width of a phone.

python docs/screenshots.py RUN [RUN ...] [--out docs/images]
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from stepcredit.display.runs import Run, read_runs
from stepcredit.report.page import write_page

VIEWS = ("curves", "rollouts", "trees", "credit", "setup")
WIDE, PHONE = (1440, 900), (390, 844)
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Headless Chromium, the system's own or the one that playwright has installed."""
    found = next((place for place in CHROMIUM if Path(place).exists()), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def empty_page(browser: Browser, size: tuple[int, int], theme: str = "light") -> Page:
    """A page of this size, in a system of this theme."""
    return browser.new_page(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if theme == "dark" else "light"
    )


def show(page: Page, file: Path, view: str, run: Run | None = None) -> None:
    """Open a view of a report and wait until it is drawn."""
    place = f"&run={run.name}" if run else ""
    if run and view == "rollouts":
        place += "&column=process"
    page.goto("about:blank")
    page.goto(f"file://{file.resolve()}#view={view}{place}")
    page.wait_for_selector("html[data-ready]", state="attached")
    if view == "curves":
        page.locator(".plot").first.scroll_into_view_if_needed()
        page.wait_for_selector(".plot .main-svg")
        page.evaluate("scrollTo(0, 0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = read_runs(given.runs)
    trees = next((run for run in runs if run.config.get("growth.name") == "tree"), runs[0])
    dense = next((run for name in ("prime", "spro") for run in runs if run.algorithm == name), runs[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        write_page(runs, file)
        with chromium() as browser:
            for theme, size, name in (("light", WIDE, "light"), ("dark", WIDE, "dark"), ("light", PHONE, "phone")):
                page = empty_page(browser, size, theme)
                for view in VIEWS:
                    show(page, file, view, trees if view == "trees" else dense)
                    page.wait_for_timeout(400)  # curves are drawn one after the other
                    picture = Image.open(BytesIO(page.screenshot()))
                    picture.convert("RGB").quantize(160).save(given.out / f"{view}-{name}.png", optimize=True)
                    print(given.out / f"{view}-{name}.png")


if __name__ == "__main__":
    main()
