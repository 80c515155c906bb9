for (const table of document.querySelectorAll("table.sortable"))
  for (const button of table.tHead.querySelectorAll("button"))
    button.addEventListener("click", () => {
      const head = button.closest("th"), column = head.cellIndex, down = head.ariaSort === "ascending";
      const text = row => row.cells[column].textContent.replaceAll(",", "");
      const order = (a, b) => text(a).localeCompare(text(b), undefined, {numeric: true}) * (down ? -1 : 1);
      const number = (a, b) => (text(a) - text(b)) * (down ? -1 : 1);
      for (const other of table.tHead.querySelectorAll("th")) other.ariaSort = "none";
      head.ariaSort = down ? "descending" : "ascending";
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(column ? number : order));
    });
