// Distributions of N_eff / N over the groups of each kind of layer, and rows that stand out.

const GAUSSIAN = 2 / Math.PI;
const FIRST_ROWS = 10;

function rowsSection(section) {
  const { kinds, rule } = content, histograms = kinds.map((kind) => kind.histogram);
  const groups = { row: "rows", layer: "matrices", model: "groups" }[rule.granularity];
  byId("rows-lead").textContent =
    `N_eff / N of all ${groups}, per kind of layer: low where a few weights dominate, 1 where all are equally large. ` +
    "The line below runs from the least to the largest, the dot is the mean; Gaussian weights have 2/π.";
  const bins = histograms[0].counts.length;
  const first = least(histograms.map((one) => one.counts.findIndex((n) => n > 0)));
  const last = most(histograms.map((one) => bins - 1 - [...one.counts].reverse().findIndex((n) => n > 0)));
  const middle = (first + last + 1) / 2, half = Math.max((last + 1 - first) / 2 + 1, 8);
  const from = Math.max(0, Math.floor(middle - half)), to = Math.min(bins, Math.ceil(middle + half));
  const grid = el("div", { class: "multiples" });
  section.append(grid);
  kinds.forEach((kind, i) => {
    const place = el("div");
    const total = histograms[i].counts.reduce((a, b) => a + b, 0);
    grid.append(el("figure", {},
      el("figcaption", {}, el("h3", {}, kind.name), el("span", {}, `mean ${kind.n_eff_fraction_mean.toFixed(4)} · ${whole(total)} ${groups}`)),
      place));
    fitted(place, (width) => place.replaceChildren(histogram(histograms[i], kind, total, from, to, width)));
  });
}

function histogram({ counts, min, max }, kind, total, from, to, width) {
  const height = 132, top = 16, bottom = 84, bins = counts.length, high = most(counts);
  const x = (fraction) => 6 + ((fraction * bins - from) / (to - from)) * (width - 12);
  const graph = draw("svg", {
    width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${kind.name}: N_eff / N from ${min} to ${max}, mean ${kind.n_eff_fraction_mean}`,
  });
  for (let i = from; i < to; i += 1) {
    if (counts[i]) {
      const tall = Math.max(1.5, (counts[i] / high) * (bottom - top)), left = x(i / bins);
      const bar = draw("rect", { class: "bar", x: left + 0.5, y: bottom - tall, width: Math.max(1, x((i + 1) / bins) - left - 1), height: tall, rx: 1 });
      bar.append(draw("title", {}, `${(i / bins).toFixed(2)} to ${((i + 1) / bins).toFixed(2)}: ${whole(counts[i])} (${percent(counts[i] / total)})`));
      graph.append(bar);
    }
  }
  graph.append(
    draw("line", { class: "axis", x1: 0, x2: width, y1: bottom, y2: bottom }),
    draw("line", { class: "gaussian", x1: x(GAUSSIAN), x2: x(GAUSSIAN), y1: top - 4, y2: bottom }),
    draw("text", { class: "gaussian", x: x(GAUSSIAN) + 4, y: top + 2 }, "2/π"),
    draw("line", { class: "whisker", x1: x(min), x2: x(max), y1: bottom + 12, y2: bottom + 12 }),
    draw("line", { class: "whisker", x1: x(min), x2: x(min), y1: bottom + 8, y2: bottom + 16 }),
    draw("line", { class: "whisker", x1: x(max), x2: x(max), y1: bottom + 8, y2: bottom + 16 }),
    draw("circle", { class: "mean", cx: x(kind.n_eff_fraction_mean), cy: bottom + 12, r: 4 }));
  const step = (to - from) / bins > 0.5 ? 0.2 : 0.1;
  for (let tick = Math.ceil(from / bins / step - 1e-9) * step; tick <= to / bins + 1e-9; tick += step) {
    graph.append(draw("text", { x: x(tick), y: bottom + 36, "text-anchor": "middle" }, tick.toFixed(1)));
  }
  return graph;
}

function standingOutSection(section) {
  const found = content.standing_out;
  const total = found ? Object.values(found.counts).reduce((a, b) => a + b, 0) : 0;
  if (!total) {
    section.append(el("p", { class: "lead" }, found
      ? "None: no row is dead, dominated by few weights or nearly uniform."
      : "emp-llm inspect looks for rows that are dead, dominated by few weights or nearly uniform."));
    return;
  }
  const kinds = Object.entries(found.counts).filter(([, n]) => n).map(([why, n]) => `${whole(n)} ${why}`).join(", ");
  const listed = found.rows.length < total ? `, the worst ${whole(found.rows.length)} listed` : "";
  section.append(el("p", { class: "lead" }, `${kinds}${listed}. Mass is Σ|w| over the median of the tensor's rows.`));
  const lines = found.rows.map(standingOutRow);
  const body = el("tbody", {}, ...lines.slice(0, FIRST_ROWS));
  const more = el("button", { type: "button", class: "more", hidden: lines.length <= FIRST_ROWS, click: showAll }, `Show all ${whole(lines.length)}`);
  function showAll() {
    body.replaceChildren(...lines);
    more.hidden = true;
  }
  window.addEventListener("beforeprint", showAll);
  section.append(el("table", { class: "wide plain" },
    el("thead", {}, el("tr", {}, ...["tensor", "why", "row", "N_eff / N", "mass"].map((word, i) => el("th", { scope: "col", class: i > 1 ? "figure" : null }, word)))),
    body), more);
}

function standingOutRow(row) {
  return el("tr", {},
    el("td", { class: "name" }, row.tensor),
    el("td", { class: "note" }, el("span", { class: "why" }, row.why)),
    el("td", { class: "figure", "data-label": "row" }, whole(row.row)),
    el("td", { class: "figure", "data-label": "N_eff / N" }, row.n_eff_fraction.toFixed(4)),
    el("td", { class: "figure", "data-label": "mass" }, `× ${Number(row.mass_ratio.toPrecision(3))}`));
}
