// All pruned tensors, sorted by any column and filtered by name, kind and cell of the heat map.

const PAGE = 50;

const COLUMNS = [
  ["name", "tensor", (value) => value],
  ["shape", "shape", (value) => content.shapes[value]],
  ["n_eff_fraction_mean", "N_eff / N", (value) => value.toFixed(4)],
  ["sparsity", "sparsity", (value) => percent(value)],
  ["retained_mass", "mass", (value) => percent(value)],
  ["bytes_after", "bytes", (value) => size(value)],
  ["bytes_ratio", "ratio", (value) => value.toFixed(3)],
];

function tableSection(section, released) {
  const { tensors, kinds } = content, total = tensors.name.length;
  const low = tensors.n_eff_fraction_min, high = tensors.n_eff_fraction_max;
  const ranged = low.every((value) => typeof value === "number");
  const span = ranged ? [least(low), most(high)] : null;
  const order = Array.from({ length: total }, (_, i) => i);
  let sorted = [...order], shown = PAGE, cell = null, by = null, down = false;

  const search = el("input", { type: "search", placeholder: "Filter by name", "aria-label": "Filter tensors by name", input: reset, spellcheck: "false", autocomplete: "off" });
  const kind = el("select", { "aria-label": "Kind of layer", change: reset },
    el("option", { value: "" }, "all kinds"), ...kinds.map((one, i) => el("option", { value: i }, one.name)));
  const clear = el("button", { type: "button", class: "clear", hidden: true, click: () => { released(); filter(null); } });
  const counted = el("span", { class: "count", role: "status" });
  const heads = COLUMNS.map(([field, word], i) => el("th", { scope: "col", class: i > 1 ? "figure" : null },
    el("button", { type: "button", click: () => sort(field) }, word)));
  const body = el("tbody");
  const more = el("button", { type: "button", class: "more", click: () => { shown += 4 * PAGE; render(); } });
  section.append(
    el("div", { class: "filters" }, search, kind, clear, counted),
    el("table", { class: "wide" }, el("thead", {}, el("tr", {}, ...heads)), body), more);

  function sort(field) {
    down = by === field ? !down : typeof tensors[field][0] === "number" && field !== "n_eff_fraction_mean";
    by = field;
    const column = tensors[field], sign = down ? -1 : 1;
    const compare = typeof column[0] === "number" ? (a, b) => a - b : (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    sorted = [...order].sort((a, b) => sign * compare(column[a], column[b]) || a - b);
    heads.forEach((head, i) => {
      if (COLUMNS[i][0] === field) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    reset();
  }

  function reset() { shown = PAGE; render(); }

  function filter(chosen) {
    cell = chosen;
    clear.hidden = !cell;
    clear.textContent = cell ? `${cell.name} ✕` : "";
    if (cell) { kind.value = ""; search.value = ""; }
    reset();
  }

  function matching() {
    const text = search.value.trim().toLowerCase();
    return sorted.filter((i) =>
      (!text || tensors.name[i].toLowerCase().includes(text)) &&
      (kind.value === "" || tensors.kind[i] === Number(kind.value)) &&
      (!cell || (tensors.kind[i] === cell.kind && tensors.block[i] === cell.block)));
  }

  function render() {
    const found = matching();
    body.replaceChildren(...found.slice(0, shown).map(row));
    counted.textContent = found.length === total ? `${whole(total)} tensors` : `${whole(found.length)} of ${whole(total)} tensors`;
    more.hidden = found.length <= shown;
    more.textContent = `Show ${whole(Math.min(4 * PAGE, found.length - shown))} more of ${whole(found.length)}`;
  }

  function row(i) {
    return el("tr", {}, ...COLUMNS.map(([field, word, show], column) => el("td",
      { class: column > 1 ? "figure" : column ? null : "name", "data-label": column ? word : null },
      show(tensors[field][i]), field === "n_eff_fraction_mean" && ranged ? glyph(i) : null)));
  }

  // A line from the smallest to the largest N_eff / N of a tensor's rows, with the mean as a dot.
  function glyph(i) {
    const width = 64, x = (value) => 4 + ((value - span[0]) / (span[1] - span[0] || 1)) * (width - 8);
    return draw("svg", { class: "range", width, height: 10, role: "img", "aria-label": `from ${low[i]} to ${high[i]}` },
      draw("line", { class: "grid", x1: 0, x2: width, y1: 5, y2: 5 }),
      draw("line", { class: "whisker", x1: x(low[i]), x2: x(high[i]), y1: 5, y2: 5 }),
      draw("circle", { class: "mean", cx: x(tensors.n_eff_fraction_mean[i]), cy: 5, r: 3 }),
      draw("title", {}, `${low[i]} to ${high[i]}`));
  }

  window.addEventListener("beforeprint", () => { shown = Math.max(shown, 1000); render(); });
  render();
  return { filter };
}

function leftSection(section) {
  section.append(el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "because"), el("th", { scope: "col", class: "figure" }, "tensors"), el("th", { scope: "col", class: "figure" }, "bytes"), el("th", { scope: "col", class: "figure" }, "stored"))),
    el("tbody", {}, ...content.left.map((part) => el("tr", {},
      el("td", {}, el("details", {}, el("summary", {}, part.reason),
        ...part.names.map((name) => el("code", {}, name)),
        part.tensors > part.names.length ? el("code", {}, `and ${whole(part.tensors - part.names.length)} more`) : null)),
      el("td", { class: "figure" }, whole(part.tensors)),
      el("td", { class: "figure" }, size(part.bytes)),
      el("td", { class: "figure" }, size(part.bytes_after)))))));
}
