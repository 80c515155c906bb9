for (const search of document.querySelectorAll(".class-search")) {
  const input = search.querySelector("input"), count = search.querySelector("output");
  const tables = [...document.getElementById(input.getAttribute("aria-controls")).querySelectorAll("table")];
  search.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.trim().toLowerCase();
    for (const table of tables)
      for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(words);
    const rows = [...tables[0].tBodies[0].rows];
    count.textContent = words ? `${rows.filter(row => !row.hidden).length} of ${rows.length} classes` : "";
  });
}
