// Images by score: sheets of the chosen score and cut, narrowed by the filters. Names are put in as text, never as HTML.
{
  const FEW = 36, MANY = 240; // pictures of the sample that are shown at once: without and with a filter

  const make = (tag, className, text) => Object.assign(document.createElement(tag), {className, textContent: text ?? ""});
  const value = text => Number(text.replace("inf", "Infinity"));
  const number = count => count.toLocaleString("en");
  const rising = (a, b) => Number.isNaN(a) - Number.isNaN(b) || Number(a > b) - Number(a < b); // what is no number comes last

  const figure = (image, place) => {
    const picture = make("img", image.pixelated ? "pixelated" : "");
    Object.assign(picture, {decoding: "async", src: image.src, alt: `${image.alt}, score ${image.scores[place]}`});
    picture.dataset.index = image.index;
    const caption = make("figcaption"), item = make("li"), frame = make("figure");
    const name = make("span", image.true_class === null ? "" : "bad", image.caption), file = make("span", "path", image.path);
    name.title = image.caption;
    file.title = image.path;
    caption.append(make("b", "", image.scores[place]), make("span", "number", image.index), name);
    if (image.corruption) caption.append(make("span", "bad", image.corruption));
    caption.append(file);
    frame.append(picture, caption);
    item.append(frame);
    return item;
  };

  for (const section of document.querySelectorAll("section.images:has(.image-store)")) {
    const find = name => section.querySelector(`.${name}`);
    const {images, scores, known} = JSON.parse(find("image-store").textContent);
    find("image-store").remove();
    const byIndex = new Map(images.map(image => [image.index, image]));
    for (const picture of section.querySelectorAll("img[data-index]"))
      byIndex.get(Number(picture.dataset.index)).src = picture.src;
    const [score, rate, classes, low, high, noise] =
      ["sheet-score", "sheet-rate", "filter-class", "filter-low", "filter-high", "filter-known"].map(find);
    const head = section.querySelector(".subtitle").tagName, sheets = find("sheets"), all = find("everything"), more = find("sheet-more");
    let limit = FEW;

    const isFiltered = () => [classes, low, high, noise].some(field => field.value !== "");
    const fits = image => {
      const at = value(image.scores[score.value]);
      return (classes.value === "" || image.label === Number(classes.value)) && (low.value === "" || at >= Number(low.value))
        && (high.value === "" || at <= Number(high.value)) && (noise.value === "" || image[noise.value] !== null);
    };
    const fill = (list, shown) => {
      list.replaceChildren(...shown.map(image => figure(image, score.value)));
      list.classList.toggle("tiny", shown.some(image => image.pixelated));
    };

    const show = () => {
      const fitting = images.filter(fits), isFitting = new Set(fitting), isShown = new Set();
      sheets.replaceChildren();
      for (const sheet of scores[score.value].sheets)
        if (sheet.rate === null || sheet.rate === rate.value) {
          const shown = sheet.index.map(index => byIndex.get(index)).filter(image => isFitting.has(image));
          if (!shown.length) continue;
          const list = make("ul", "sheet");
          fill(list, shown);
          const left = shown.length === sheet.index.length ? sheet.note
            : `${number(shown.length)} of ${sheet.note[0].toLowerCase()}${sheet.note.slice(1)}`;
          sheets.append(make(head, "subtitle", sheet.head), make("p", "note", left), list);
          for (const image of shown) isShown.add(image);
        }
      const some = fitting.slice(0, limit); // the store begins with the sample, well spread wherever it is cut
      const place = image => value(image.scores[score.value]);
      fill(all.querySelector("ul"), [...some].sort((a, b) => rising(place(a), place(b))));
      for (const image of some) isShown.add(image);
      more.hidden = some.length === fitting.length;
      const title = all.querySelector(".subtitle"), note = all.querySelector(".note");
      if (isFiltered()) {
        sheets.before(all);
        title.textContent = fitting.length > 1 ? `The ${number(fitting.length)} images in this page that fit, lowest score first`
          : fitting.length ? "The one image in this page that fits" : "No image in this page fits the filters";
      } else {
        sheets.after(all);
        title.textContent = "A sample of all images";
      }
      note.textContent = `${more.hidden ? "All" : `${number(some.length)} of the`} ${number(fitting.length)} in this page, by rising score.`;
      note.hidden = isFiltered() && more.hidden;
      more.textContent = `Show ${number(Math.min(MANY, fitting.length - some.length))} more`;
      find("filter-count").textContent = `Showing ${number(isShown.size)} of ${number(images.length)} images`;
    };
    const filter = () => {
      limit = isFiltered() ? MANY : FEW;
      show();
    };
    const choose = () => {
      const texts = images.map(image => image.scores[score.value]).filter(text => Number.isFinite(value(text)));
      texts.sort((a, b) => rising(value(a), value(b)));
      low.value = high.value = "";
      low.placeholder = texts[0] ?? "";
      high.placeholder = texts.at(-1) ?? "";
      const rates = [...new Set(scores[score.value].sheets.map(sheet => sheet.rate).filter(text => text !== null))];
      const before = rate.value;
      rate.replaceChildren(...rates.map(text => new Option(`${text} removed`, text)));
      if (rates.includes(before)) rate.value = before;
      find("of-rate").hidden = rates.length === 0;
      find("sheet-name").textContent = scores[score.value].name;
      filter();
    };

    score.append(...scores.map(({name}, place) => new Option(name, place)));
    const names = new Map(images.map(image => [image.label, image.class_name]));
    classes.append(...[...names].sort((a, b) => a[0] - b[0]).map(([label, name]) => new Option(name, label)));
    const words = {true_class: "wrongly labelled", corruption: "corrupted"};
    noise.append(...known.map(kind => new Option(words[kind], kind)));
    find("of-known").hidden = known.length === 0;
    score.addEventListener("change", choose);
    rate.addEventListener("change", show);
    for (const field of [classes, low, high, noise]) field.addEventListener("input", filter);
    find("filter-reset").addEventListener("click", () => {
      classes.value = low.value = high.value = noise.value = "";
      filter();
    });
    more.addEventListener("click", () => {
      limit += MANY;
      show();
    });
    choose();
    find("choices").hidden = all.hidden = false;
  }
}
