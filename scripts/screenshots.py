"""Pictures of a report for the documentation: python scripts/screenshots.py runs/demo/report.html
docs/images

Needs playwright and a Chromium (tests/system/browser/install.sh).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.system.browser.chromium import SIZES, launched  # noqa: E402

# file name -> size, scheme, what is shown (None: the top of the page), height in CSS pixels at most
PICTURES = {
    "report_top": ("desktop", "light", None, 900),
    "report_phone": ("phone", "dark", None, 844),
    "report_images": ("desktop", "light", "section:has(> [id$=-images])", 900),
    "report_scores": ("desktop", "light", "section:has(> [id$=-scores])", 900),
    "report_agreement": ("desktop", "light", "section:has(> [id$=-agreement])", 900),
}


def main(report: Path, folder: Path) -> None:
    """Write one PNG per entry of PICTURES."""
    folder.mkdir(parents=True, exist_ok=True)
    with launched() as browser:
        for name, (size, scheme, selector, most) in PICTURES.items():
            width, height = SIZES[size]
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(report.resolve().as_uri())
            page.evaluate(
                "document.querySelectorAll('img').forEach(image => image.loading = 'eager')"
            )
            page.wait_for_function("[...document.images].every(image => image.complete)")
            clip = None
            if selector:
                box = page.locator(selector).first.bounding_box()
                assert box is not None, f"{report} has no {selector}"
                clip = {
                    "x": 0,
                    "y": max(0, box["y"] - 16),
                    "width": width,
                    "height": min(box["height"] + 32, most),
                }
            page.screenshot(path=folder / f"{name}.png", full_page=selector is not None, clip=clip)
            page.close()
            print(f"wrote {folder / f'{name}.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
