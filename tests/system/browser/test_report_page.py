"""The demo's report as its reader has it: in a browser, at a desk and on a phone."""

import re

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(params=["desktop", "phone"])
def page(demo, open_page, request):
    return open_page(demo.report, request.param).page


@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_errors_requests_or_sideways_scrolling_and_images_load(
    demo, open_page, size, scheme
):
    opened = open_page(demo.report, size, scheme)
    page = opened.page
    page.mouse.wheel(0, 100_000)
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = (int(value) for value in re.findall(r"\d+", paper)[:3])
    assert (red + green + blue > 600) == (scheme == "light")
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) >= 48
    assert set(widths) == {32}  # the digits as they were written
    assert (opened.errors, opened.requests) == ([], [])


def test_tables_sort_by_number_both_ways(page):
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
                    "(rows, at) => rows.map(row => row.cells[at]).map(cell => cell.dataset.value ??"
                    " cell.textContent)",
                    column,
                )
                found = [
                    re.search(r"-?\d+(?:\.\d+)?", cell.replace(",", "").replace("−", "-"))
                    for cell in cells
                ]
                numbers = [float(number[0]) for number in found if number]
                if len(numbers) == len(cells) and column:
                    assert numbers == sorted(numbers, reverse=direction == "descending")
                    num_sorted += 1
                orders.append(direction)
            assert set(orders) == {"ascending", "descending"}
    assert num_sorted >= 2


def captions(section):
    """Score and class under every picture that is shown."""
    scores = [float(text) for text in section.locator("figcaption b").all_inner_texts()]
    return scores, section.locator("figcaption span.number + span").all_inner_texts()


def test_images_are_filtered_by_class_and_by_score(page):
    section = page.locator("section.images")
    count = section.locator(".filter-count")
    before = count.inner_text()
    section.locator(".filter-class").select_option("3")
    scores, classes = captions(section)
    assert set(classes) == {"3"}
    low, high = sorted(scores)[len(scores) // 4], sorted(scores)[len(scores) // 2]
    section.locator(".filter-low").fill(str(low))
    section.locator(".filter-high").fill(str(high))
    fewer, classes = captions(section)
    assert 0 < len(fewer) < len(scores)
    assert set(classes) == {"3"}
    assert low <= min(fewer) <= max(fewer) <= high
    assert int(re.search(r"Showing (\d+) of", count.inner_text())[1]) <= len(fewer)
    section.locator(".filter-reset").click()
    assert count.inner_text() == before


def test_other_scores_and_cuts_show_their_images(demo, open_page):
    section = open_page(demo.report).page.locator("section.images")
    names = section.locator(".sheet-score option").all_inner_texts()
    assert {"el2n_T3", "aum", "forgetting", "dual_J3"} <= set(names)
    assert not any(name.startswith("random") for name in names)
    sheets = section.locator(".sheets")
    first = sheets.locator("img").first.get_attribute("data-index")
    for name in names:
        section.locator(".sheet-score").select_option(label=name)
        highest = [
            float(text) for text in sheets.locator("ul").first.locator("b").all_inner_texts()
        ]
        assert len(highest) > 10
        assert highest == sorted(highest, reverse=True), name
    section.locator(".sheet-score").select_option(label="el2n_T3")
    assert sheets.locator("img").first.get_attribute("data-index") != first


def test_without_scripts_the_main_sheets_stay(demo, open_page):
    section = open_page(demo.report, scripts=False).page.locator("section.images")
    assert section.locator(".sheets img").count() >= 48
    assert not section.locator(".choices").is_visible()
    assert not section.locator(".everything").is_visible()


def test_agreement_shows_one_matrix_at_a_time(page):
    tables, shown = page.locator("table.heat"), page.locator("table.heat:visible")
    assert tables.count() == 3  # rank correlation, overlap at 50 and at 80 %
    first = shown.inner_text()
    page.locator("label", has_text="Overlap at 80 %").click()
    assert shown.count() == 1
    assert shown.inner_text() != first


def test_links_of_the_contents_lead_somewhere(demo, open_page):
    page = open_page(demo.report).page
    links = page.locator("nav a").all()
    assert len(links) >= 6
    for link in links:
        link.click()
        assert page.locator(link.get_attribute("href")).is_visible()


def test_the_demo_says_what_to_do_next(demo):
    assert f"open {demo.report}" in demo.printed
    assert "Traceback" not in demo.printed
