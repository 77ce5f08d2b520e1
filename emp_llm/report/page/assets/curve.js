// Sparsity, bytes and retained mass against β, with a cursor on the values that were counted.

const LINES = [
  ["sparsity", "sparsity", "sparsity"],
  ["bytes_ratio", "bytes", "bytes"],
  ["retained_mass", "mass", "retained mass"],
];

function curveSection(section) {
  const { curve, rule } = content;
  if (!curve) {
    const why = rule.granularity === "row"
      ? `This report is of one β. emp-llm inspect ${content.source.model} --html FILE counts them all.`
      : `The curve is counted for row groups only; here a group is a ${rule.granularity}.`;
    section.append(el("p", { class: "note" }, why), command(() => rule.beta).node);
    return;
  }
  byId("curve-lead").append(" Every point is counted exactly, from the same pass over the weights.");
  const { beta, parts } = curve;
  const nearest = (value) => beta.reduce((best, b, i) => (Math.abs(b - value) < Math.abs(beta[best] - value) ? i : best), 0);
  let part = 0, at = nearest(rule.beta), frame = null;

  const plot = el("div", { class: "plot", "aria-hidden": "true" });
  const slider = el("input", {
    class: "slider", type: "range", min: beta[0], max: beta[beta.length - 1], step: "any", "aria-label": "β",
    input: () => moveTo(nearest(Number(slider.value))), keydown: step,
  });
  const readout = el("div", { class: "readout" });
  const line = command(() => beta[at]);

  function moveTo(i) {
    at = i;
    slider.value = beta[i];
    const chosen = parts[part], bytes = chosen.bytes[at];
    slider.setAttribute("aria-valuetext", `β ${beta[at]}: sparsity ${percent(chosen.sparsity[at])}, ` +
      `${percent(chosen.bytes_ratio[at])} of the bytes, retained mass ${percent(chosen.retained_mass[at])}`);
    readout.replaceChildren(
      el("p", { class: "beta-value" }, `β = ${beta[at]}`),
      el("dl", {},
        pair("sparsity", "sparsity", percent(chosen.sparsity[at])),
        pair("bytes", "bytes", `${(100 * chosen.bytes_ratio[at]).toFixed(1)}%`, `${size(bytes)} of ${size(chosen.bytes_before)}`),
        pair("mass", "retained mass", percent(chosen.retained_mass[at])),
        pair(null, "whole model", size(curve.model_bytes[at]), `of ${size(content.totals.model.bytes_before)}`)));
    line.update();
    if (frame) drawCursor();
  }

  // From one counted β to the next: by itself the slider would stop between them.
  function step(event) {
    const last = beta.length - 1;
    const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, PageDown: at - 10, PageUp: at + 10, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    moveTo(Math.max(0, Math.min(last, to)));
  }

  function pair(key, word, figure, more = null) {
    const sample = key && draw("svg", { width: 22, height: 6, "aria-hidden": "true" },
      draw("line", { class: `line ${key}`, x1: 1, x2: 21, y1: 3, y2: 3 }));
    return el("div", {}, el("dt", {}, sample || null, word), el("dd", {}, figure, more && el("small", {}, more)));
  }

  function drawPlot(width) {
    const height = width < 520 ? 250 : 320;
    const box = { left: 44, right: width - 14, top: 14, bottom: height - 40 };
    const [low, high] = [0, beta[beta.length - 1]];
    const x = (b) => box.left + ((b - low) / (high - low)) * (box.right - box.left);
    const y = (share) => box.bottom - share * (box.bottom - box.top);
    const graph = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      graph.append(
        draw("line", { class: share ? "grid" : "axis", x1: box.left, x2: box.right, y1: y(share), y2: y(share) }),
        draw("text", { x: box.left - 8, y: y(share) + 4, "text-anchor": "end" }, percent(share, 0)));
    }
    const step = high > 3 ? 1 : width < 520 ? 0.5 : 0.25;
    for (let b = 0; b <= high + 1e-9; b += step) {
      graph.append(draw("text", { x: x(b), y: box.bottom + 18, "text-anchor": "middle" }, String(b)));
    }
    graph.append(draw("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, "β"));
    if (high >= 1) {
      graph.append(
        draw("line", { class: "paper", x1: x(1), x2: x(1), y1: box.top, y2: box.bottom }));
    }
    for (const [field, key] of LINES) {
      const points = beta.map((b, i) => `${x(b).toFixed(2)},${y(parts[part][field][i]).toFixed(2)}`);
      graph.append(draw("polyline", { class: `line ${key}`, points: points.join(" ") }));
    }
    const cursor = draw("g");
    graph.append(cursor);
    plot.replaceChildren(graph);
    const thumb = 8;  // half its width, so that its middle is under the cursor
    slider.style.marginLeft = `${x(beta[0]) - thumb}px`;
    slider.style.width = `${x(high) - x(beta[0]) + 2 * thumb}px`;
    frame = { box, x, y, cursor, low, high };
    drawCursor();
  }

  function drawCursor() {
    const { box, x, y, cursor } = frame, here = x(beta[at]);
    cursor.replaceChildren(
      draw("line", { class: "cursor", x1: here, x2: here, y1: box.top, y2: box.bottom }),
      ...LINES.map(([field, key]) => draw("circle", { class: key, cx: here, cy: y(parts[part][field][at]), r: 4.5 })));
  }

  function follow(event) {
    if (event.pointerType === "mouse" || event.buttons) {
      const { box, low, high } = frame, bounds = plot.getBoundingClientRect();
      const share = (event.clientX - bounds.left - box.left) / (box.right - box.left);
      const target = nearest(low + share * (high - low));
      if (target !== at) moveTo(target);
    }
  }
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);

  let width = 0;
  const choose = chips("Which tensors", parts.map((one) => one.name), (i) => {
    part = i;
    if (width) drawPlot(width);
    moveTo(at);
  });
  const end = el("p", { class: "note" }, `From β = ${curve.whole_at} on, every row is whole.`);
  section.append(choose, el("div", { class: "beta" }, el("div", {}, plot, slider, end), readout), line.node);
  fitted(plot, (now) => drawPlot((width = now)));
  choose.press(0);
}

// The command that prunes at a β, with a button that copies it.
function command(beta) {
  const code = el("code");
  const button = el("button", { type: "button", class: "copy", click: copy }, "Copy");
  const said = el("span", { class: "unseen", role: "status" });
  const update = () => {
    const words = [...content.command, "--beta", String(beta())];
    code.replaceChildren(...words.flatMap((word, i) => [i ? " " : "", el("span", {}, word)]));
  };

  async function copy() {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {  // a page from a file may have no clipboard: select the text for the browser's own copy
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    said.textContent = "The command is in the clipboard.";
    setTimeout(() => { button.textContent = "Copy"; said.textContent = ""; }, 1600);
  }
  update();
  return { node: el("div", { class: "command" }, code, button, said), update };
}
