"""The demo's report as its reader has it: in a browser, at a desk and on a phone."""

import re

import pytest

pytestmark = pytest.mark.browser

SCHEMES = ("light", "dark")


@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_opens_without_errors_requests_or_sideways_scrolling(demo, open_page, size, scheme):
    opened = open_page(demo.report, size, scheme)
    page = opened.page
    page.mouse.wheel(0, 100_000)
    assert opened.errors == []
    assert opened.requests == []
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = (int(value) for value in re.findall(r"\d+", paper)[:3])
    assert (red + green + blue > 600) == (scheme == "light")


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_images_load(demo, open_page, size):
    page = open_page(demo.report, size).page
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) >= 48
    assert set(widths) == {32}  # the digits as they were written


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_tables_sort_by_number_both_ways(demo, open_page, size):
    page = open_page(demo.report, size).page
    num_sorted = 0
    for table in page.locator("table.sortable").all():
        if not table.is_visible():
            continue
        for column, button in enumerate(table.locator("thead th button").all()[:4]):
            head = button.locator("xpath=ancestor::th")
            orders = []
            for _ in range(2):
                button.click()
                direction = head.get_attribute("aria-sort")
                cells = table.locator("tbody:not(.whole-data) tr").evaluate_all(
                    "(rows, at) => rows.map(row => row.cells[at]).map(cell => cell.dataset.value ?? cell.textContent)", column)
                found = [re.search(r"-?\d+(?:\.\d+)?", cell.replace(",", "").replace("−", "-")) for cell in cells]
                numbers = [float(number[0]) for number in found if number]
                if len(numbers) == len(cells) and column:
                    assert numbers == sorted(numbers, reverse=direction == "descending")
                    num_sorted += 1
                orders.append(direction)
            assert set(orders) == {"ascending", "descending"}
    assert num_sorted >= 2


def test_the_demo_says_what_to_do_next(demo):
    assert f"open {demo.report}" in demo.printed
    assert "Traceback" not in demo.printed
