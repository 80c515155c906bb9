// Sorts tables, shows and hides curves, opens what a link leads to. The page can be read without it.
document.documentElement.classList.add("script");

// ---- tables: `<table class="sortable">`, a button in each head that sorts; `data-value` where a cell's text does not say its place

const missing = ["", "–"];
const NUMBER = /^[+-]?(\d[\d,]*)?\.?\d+(e[+-]?\d+)?(?=$|[\s%±×(/])/i;

function valueOf(row, column) {
  const cell = row.cells[column];
  return (cell?.dataset.value ?? cell?.textContent ?? "").trim().replace("−", "-");
}

function numberOf(text) {
  const found = text.match(NUMBER);
  return found ? Number(found[0].replaceAll(",", "")) : NaN;
}

function sort(table, column, down) {
  for (const body of table.tBodies) {
    const rows = [...body.rows].map(row => ({row, text: valueOf(row, column)}));
    const known = rows.filter(({text}) => !missing.includes(text));
    const areNumbers = known.every(({text}) => !Number.isNaN(numberOf(text)));
    const order = areNumbers ? (a, b) => numberOf(a.text) - numberOf(b.text)
      : (a, b) => a.text.localeCompare(b.text, undefined, {numeric: true});
    known.sort((a, b) => down ? order(b, a) : order(a, b));
    body.append(...known.map(({row}) => row), ...rows.filter(({text}) => missing.includes(text)).map(({row}) => row));
  }
}

for (const table of document.querySelectorAll("table.sortable"))
  for (const button of table.tHead.querySelectorAll("button"))
    button.addEventListener("click", () => {
      const head = button.closest("th"), down = head.ariaSort === "ascending";
      sort(table, head.cellIndex, down);
      for (const other of table.tHead.querySelectorAll("th[aria-sort]")) other.ariaSort = "none";
      head.ariaSort = down ? "descending" : "ascending";
    });

// ---- legends: a name shows its curves alone; more names add theirs

for (const legend of document.querySelectorAll("figure .legend")) {
  const items = [...legend.querySelectorAll("li[data-series]")], all = items.map(item => item.dataset.series);
  if (items.length < 2) continue;
  const curves = legend.closest("figure").querySelectorAll("svg [data-series]");
  let shown = new Set(all);
  const update = () => {
    for (const curve of curves) curve.style.display = shown.has(curve.dataset.series) ? "" : "none";
    for (const item of items) item.firstElementChild.ariaPressed = String(shown.has(item.dataset.series));
  };
  for (const item of items) {
    const button = document.createElement("button"), series = item.dataset.series;
    button.type = "button";
    button.append(...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      if (shown.size === all.length) shown = new Set([series]);
      else if (!shown.delete(series)) shown.add(series);
      if (!shown.size) shown = new Set(all);
      update();
    });
  }
  update();
}

// ---- details: open for a link to something in them, and for print

function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  let closed = false;
  for (const details of document.querySelectorAll("details:not([open])"))
    if (target && (details.contains(target) || target.firstElementChild === details)) closed = details.open = true;
  if (closed) target.scrollIntoView();
}
addEventListener("hashchange", reveal);
for (const link of document.querySelectorAll('a[href^="#"]')) link.addEventListener("click", () => setTimeout(reveal));
reveal();

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
