// The heat map of decoder blocks × kinds of layer. The table below shows the tensors of the chosen cell.

// Field, name, how it is written, and whether a high value means that little is pruned.
const MEASURES = [
  ["n_eff_fraction_mean", "N_eff / N", (value) => value.toFixed(4), true],
  ["sparsity", "sparsity", (value) => percent(value), false],
  ["retained_mass", "retained mass", (value) => percent(value), true],
  ["bytes_ratio", "bytes", (value) => value.toFixed(3), true],
];

function blocksSection(section, filter) {
  const { blocks, kinds, cells } = content;
  const lists = new Set(blocks.map((block) => block.list));
  const place = el("div", { class: "map", tabindex: 0, role: "application" });
  const legend = el("div", { class: "legend" });
  const said = el("p", { class: "unseen", role: "status" });
  const below = el("a", { href: "#tensors", hidden: true });
  const at = new Map(cells.map((cell) => [`${cell.kind} ${cell.block}`, cell]));
  let measure = MEASURES[0], width = 0, focus = cells[0], chosen = null, layout = null;

  place.setAttribute("aria-label", `${blocks.length} blocks by ${kinds.length} kinds of layer: arrow keys move, Enter shows the tensors of a cell`);

  function blockName(number) {
    const block = blocks[number];
    return block.number === null ? block.name : `${lists.size > 1 ? `${block.list} ` : "block "}${block.number}`;
  }

  function range() {
    const values = cells.map((cell) => cell[measure[0]]), [low, high] = [least(values), most(values)];
    const spread = Math.max(0, content.least_spread - (high - low)) / 2;
    return [Math.max(0, low - spread), Math.min(1, high + spread)];
  }

  // The more is pruned, the stronger the colour, whichever measure is shown.
  const tone = (share) => rampAt(measure[3] ? 1 - share : share);

  function drawMap() {
    const beside = width >= 640, label = beside ? 12 + 7.4 * most(kinds.map((kind) => kind.name.length)) : 0;
    const tall = beside ? 34 : 26, above = beside ? 0 : 22, step = tall + above + (beside ? 3 : 6);
    const lists_ = [...lists], gaps = lists_.length - 1, gap = 12;
    const pitch = Math.min(168, (width - label - gaps * gap) / blocks.length), space = pitch > 7 ? 2 : pitch > 4 ? 0.75 : 0;
    const bottom = kinds.length * step, height = bottom + (lists.size > 1 ? 44 : 26);
    const left = blocks.map((block, i) => label + i * pitch + lists_.indexOf(block.list) * gap);
    const graph = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const [low, high] = range();
    kinds.forEach((kind, row) => {
      const top = row * step + above;
      graph.append(draw("text", { class: "label", x: 0, y: beside ? top + tall / 2 + 4 : top - 6 }, kind.name));
      blocks.forEach((_, number) => {
        const cell = at.get(`${row} ${number}`), value = cell && cell[measure[0]];
        const look = cell && tone((value - low) / (high - low || 1));
        graph.append(draw("rect", {
          x: left[number], y: top, width: pitch - space, height: tall, rx: pitch > 7 ? 3 : 0,
          ...(cell ? { fill: look.color } : { class: "absent" }),
        }));
        if (cell && pitch >= 54) {
          graph.append(draw("text", {
            class: `cell ${look.isDark ? "on-dark" : "on-light"}`, x: left[number] + (pitch - space) / 2, y: top + tall / 2 + 4, "text-anchor": "middle",
          }, measure[2](value)));
        }
      });
    });
    const every = [1, 2, 5, 10, 20, 50, 100].find((n) => n * pitch >= 26) || 200;
    blocks.forEach((block, i) => {
      if (block.number !== null && block.number % every === 0) {
        graph.append(draw("text", { x: left[i] + (pitch - space) / 2, y: bottom + 14, "text-anchor": "middle" }, String(block.number)));
      }
    });
    if (lists.size > 1) {
      for (const list of lists_) {
        const first = blocks.findIndex((block) => block.list === list);
        graph.append(draw("text", { x: left[first], y: bottom + 34 }, list || "outside the blocks"));
      }
    }
    const mark = draw("g");
    graph.append(mark);
    place.replaceChildren(graph);
    layout = { left, pitch, space, step, above, tall, mark };
    drawLegend(low, high);
    drawMark();
  }

  function drawLegend(low, high) {
    const wide = 150, bands = 30;
    const scale = draw("svg", { width: wide, height: 12, "aria-hidden": "true" });
    for (let i = 0; i < bands; i += 1) {
      scale.append(draw("rect", { x: (i * wide) / bands, y: 0, width: wide / bands + 0.5, height: 12, fill: tone((i + 0.5) / bands).color }));
    }
    const [field, name, show] = measure;
    const gaussian = field === "n_eff_fraction_mean" ? "Gaussian weights have 2/π = 0.6366" : "";
    legend.replaceChildren(el("span", {}, name), el("span", {}, show(low)), scale, el("span", {}, show(high)), el("span", {}, gaussian), below);
  }

  function drawMark() {
    const marked = chosen || (document.activeElement === place ? focus : null);
    const { left, pitch, space, step, above, tall, mark } = layout;
    mark.replaceChildren(...[...new Set([marked, document.activeElement === place ? focus : null])].filter(Boolean).map((cell) => draw("rect", {
      class: "chosen", x: left[cell.block] - 1, y: cell.kind * step + above - 1, width: Math.max(pitch - space, 3) + 2, height: tall + 2, rx: 3,
    })));
  }

  function tell(cell) {
    const { left, pitch, step, above } = layout, bounds = place.getBoundingClientRect();
    const pairs = MEASURES.map(([field, name, show]) => [name, show(cell[field])]);
    pairs.push(["tensors", whole(cell.tensors)], ["size", `${size(cell.bytes_before)} → ${size(cell.bytes_after)}`]);
    const heading = `${blockName(cell.block)} · ${kinds[cell.kind].name}`;
    showTip(heading, pairs, bounds.left + left[cell.block] + pitch / 2, bounds.top + cell.kind * step + above);
    return `${heading}: ${pairs.map((pair) => pair.join(" ")).join(", ")}`;
  }

  function cellAt(event) {
    const bounds = place.getBoundingClientRect(), { left, pitch, step, above } = layout;
    const x = event.clientX - bounds.left, y = event.clientY - bounds.top, row = Math.floor(y / step);
    const number = left.findIndex((start) => x >= start && x < start + pitch);
    return y - row * step < above ? null : at.get(`${row} ${number}`) || null;
  }

  function choose(cell) {
    chosen = cell === chosen ? null : cell;
    filter(chosen && { kind: chosen.kind, block: chosen.block, name: `${blockName(chosen.block)} · ${kinds[chosen.kind].name}` });
    below.hidden = !chosen;
    below.textContent = chosen ? `${whole(chosen.tensors)} ${chosen.tensors === 1 ? "tensor" : "tensors"} below ↓` : "";
    drawMark();
  }

  place.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell) tell(cell); else hideTip();
  });
  place.addEventListener("pointerleave", hideTip);
  place.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) { focus = cell; choose(cell); }
  });
  place.addEventListener("blur", () => { hideTip(); drawMark(); });
  place.addEventListener("focus", drawMark);
  place.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Enter" || event.key === " ") choose(focus);
    else if (event.key === "Escape") { hideTip(); if (chosen) choose(chosen); }
    else if (moves[event.key]) {
      const [rows, columns] = moves[event.key];
      let [row, number] = [focus.kind + rows, focus.block + columns];
      while (row >= 0 && row < kinds.length && number >= 0 && number < blocks.length && !at.has(`${row} ${number}`)) [row, number] = [row + rows, number + columns];
      focus = at.get(`${row} ${number}`) || focus;
      drawMark();
      said.textContent = tell(focus);
    } else return;
    event.preventDefault();
  });

  const pick = chips("What colours show", MEASURES.map((one) => one[1]), (i) => {
    measure = MEASURES[i];
    if (width) drawMap();
  });
  section.append(pick, place, legend, said);
  pick.press(0);
  fitted(place, (now) => { width = now; drawMap(); });
  dark.addEventListener("change", drawMap);
  return { clear: () => { chosen = null; below.hidden = true; drawMark(); } };
}
