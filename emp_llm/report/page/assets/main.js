// The page from top to bottom: a few main numbers of the report, then each section.

function heading() {
  const { source, rule, totals, format, version } = content, { targets, model } = totals;
  byId("model").textContent = source.model;
  const facts = [
    ["β", rule.beta], ["groups", { row: "rows", layer: "matrices", model: "the whole model" }[rule.granularity]],
    ...(rule.allocate ? [["allocation", rule.allocate]] : []),
    ["score", rule.criterion], ...(rule.count_by ? [["counted by", rule.count_by]] : []),
    ...(rule.repair ? [["repair", rule.repair]] : []),
    ...(rule.calibration?.text ? [["calibrated on", `${rule.calibration.samples} × ${rule.calibration.length} tokens of ${rule.calibration.text}`]] : []),
    ["targets", rule.targets], ...rule.ignore.map((pattern) => ["ignored", pattern]),
    ["format", format], ...(source.revision ? [["revision", source.revision.slice(0, 12)]] : []),
  ];
  byId("facts").append(...facts.map(([word, fact]) => el("li", {}, `${word} `, el("b", {}, String(fact)))));
  const gauge = el("span");
  gauge.style.width = percent(Math.min(1, model.bytes_ratio));
  byId("headline").append(
    figure("whole model", [size(model.bytes_after), el("small", {}, ` of ${size(model.bytes_before)}`)],
      [el("div", { class: "gauge" }, gauge), `${percent(model.bytes_ratio, 1)} of its bytes; ${percent(targets.bytes_ratio, 1)} of those of the ${whole(targets.tensors)} targets`]),
    figure("sparsity of the targets", [percent(targets.sparsity)], [`${percent(model.sparsity)} of all ${count(model.weights)} weights`]),
    figure("effective fraction N_eff / N", [targets.n_eff_fraction_mean.toFixed(4)], ["Gaussian weights: 0.6366"]),
    figure("retained mass", [percent(targets.retained_mass, 1)],
      [targets.retained_mass_bound === null ? `share of ${rule.criterion === "magnitude" ? "Σ|w|" : "all scores"} that stays` : `at least ${percent(targets.retained_mass_bound, 1)} by the bound`]));
  byId("made").textContent = `Made by emp-llm ${version}.`;
}

function figure(word, value, more) {
  return el("div", {}, el("dt", {}, word), el("dd", { class: "value" }, ...value), el("dd", { class: "note" }, ...more));
}

heading();
curveSection(byId("curve"));
const table = tableSection(byId("tensors"), () => map.clear());
const map = blocksSection(byId("blocks"), table.filter);
rowsSection(byId("rows"));
standingOutSection(byId("standing-out"));
leftSection(byId("left"));
