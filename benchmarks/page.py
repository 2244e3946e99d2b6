"""How long a visitor waits, in Chromium at a phone's width: until the first picture, and from a click to 8 + 8 images.

    python benchmarks/page.py --output benchmarks/page.json
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from visitors import start

from baddiff.compute import device_name

CHANGED = "old => [...document.querySelectorAll('.see img')].at(-1)?.src !== old"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                                             args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 850})
        begun = time.perf_counter()  # the app's process starts; the browser is there already
        app, url, _ = start()
        try:
            page.goto(url)
            page.locator(".see img").nth(23).wait_for()
            first, clicks = time.perf_counter() - begun, []
            for name in ("glasses → hat", "box → shoe", "stop sign → cat") * 4:
                time.sleep(1)
                old = page.locator(".see img").last.get_attribute("src")
                begun = time.perf_counter()
                page.get_by_label(name).check()
                page.wait_for_function(CHANGED, arg=old)
                clicks.append(round(time.perf_counter() - begun, 2))
        finally:
            app.terminate()
            browser.close()
    out = {"device": device_name(), "seconds_to_first_picture": round(first, 2), "seconds_from_click": clicks,
           "median_from_click": statistics.median(clicks)}
    print(json.dumps(out, indent=1))
    if args.output:
        args.output.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
