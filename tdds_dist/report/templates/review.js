// Decisions on suspicious labels: kept in this browser, saved as a CSV file. Names are put in as text, never as HTML.
{
  const {key, classes, typical} = JSON.parse(document.getElementById("store").textContent);
  const known = new Set(classes), cards = [...document.querySelectorAll(".card")], bar = document.querySelector(".bar");
  const place = `tdds-suspects-${key}`;
  const stored = () => { try { return JSON.parse(localStorage.getItem(place)) ?? {}; } catch { return {}; } };
  const keep = all => { try { localStorage.setItem(place, JSON.stringify(all)); } catch { /* no storage: this page alone remembers */ } };
  const decisions = new Map(Object.entries(stored())); // index -> class

  const show = () => {
    const here = cards.filter(card => decisions.has(card.dataset.index));
    const changed = here.filter(card => decisions.get(card.dataset.index) !== card.dataset.label);
    for (const card of cards) card.classList.toggle("done", decisions.has(card.dataset.index));
    const elsewhere = decisions.size - here.length;
    bar.querySelector(".decided").textContent = `${here.length} of ${cards.length} decided, ${changed.length} labels changed`
      + (elsewhere ? `; ${elsewhere} decided on other pages are saved there` : "");
  };
  const decide = (card, name) => {
    if (known.has(name)) decisions.set(card.dataset.index, name); else decisions.delete(card.dataset.index);
    keep(Object.fromEntries(decisions));
    show();
  };
  const mark = card => {
    const name = decisions.get(card.dataset.index), radio = value => card.querySelector(`input[value=${value}]`), as = card.querySelector(".as");
    for (const each of card.querySelectorAll("input[type=radio]")) each.checked = false;
    as.value = "";
    if (name === undefined) return;
    const which = name === card.dataset.label ? "keep" : name === card.dataset.other ? "other" : "as";
    radio(which).checked = true;
    if (which === "as") as.value = name;
  };
  const field = text => `"${String(text).replaceAll('"', '""')}"`;
  const csv = () => ["index,path,label,new_label", ...cards.filter(card => decisions.has(card.dataset.index)).map(
    ({dataset: {index, path, label}}) => [index, field(path), field(label), field(decisions.get(index))].join(","))].join("\n") + "\n";

  for (const card of cards) {
    for (const strip of card.querySelectorAll(".like"))
      for (const src of typical[strip.dataset.class] ?? [])
        strip.append(Object.assign(document.createElement("img"), {src, alt: "", decoding: "async"}));
    card.querySelector("fieldset").hidden = false;
    const as = card.querySelector(".as");
    const typed = () => {
      as.setCustomValidity(as.value === "" || known.has(as.value) ? "" : "no class of this name");
      card.querySelector("input[value=as]").checked = true;
      decide(card, as.value);
    };
    as.addEventListener("input", typed);
    card.addEventListener("change", ({target}) => {
      if (target.type !== "radio") return;
      if (target.value === "as") { as.focus(); typed(); } else decide(card, target.value === "keep" ? card.dataset.label : card.dataset.other);
    });
    mark(card);
  }
  bar.hidden = false;
  bar.querySelector(".save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
    link.download = "decisions.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  bar.querySelector(".forget").addEventListener("click", () => {
    if (!confirm("Forget the decisions on the images of this page?")) return;
    for (const card of cards) decisions.delete(card.dataset.index);
    keep(Object.fromEntries(decisions));
    cards.forEach(mark);
    show();
  });
  show();
}
