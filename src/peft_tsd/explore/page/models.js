// All weights of a model, several models, and training over time.

function showConcentration(model) {
  const columns = data.highest.map((n) => `highest_${n}_rate`);
  const line = (name, means, total) => element("tr", { class: total ? "total" : null }, head(name, "row"),
    cell(String(means.count)), ...columns.map((key) => cell(percent(means[key]))), cell(means.gini.toFixed(2)));
  fill($("concentration"), ["Module", "Weights", ...data.highest.map((n) => `Highest ${n}`), "Gini"],
    [...model.kinds.map((means) => line(means.kind, means, false)), line("All weights", model.overall, true),
      line("A random change of them", { ...model.random_change, count: model.overall.count }, false)]);
}

function showPositions(model, colours) {
  const bins = model.histogram.length;
  const centres = range(bins).map((i) => (i + 0.5) / bins);
  const hover = centres.map((x) => `${(x - 0.5 / bins).toFixed(2)} to ${(x + 0.5 / bins).toFixed(2)}`);
  const bars = {
    type: "bar", x: centres, y: model.histogram, customdata: hover, marker: { color: colours.accent },
    hovertemplate: "position %{customdata}<br>%{y:.1%} of the TSDs<extra></extra>",
  };
  const chance = {
    type: "scatter", mode: "lines", x: centres, y: model.random_histogram,
    line: { color: colours.ink, width: 1.5, dash: "dash", shape: "hvh" },
    hovertemplate: "under a random change<br>%{y:.1%}<extra></extra>",
  };
  draw("positions", colours, [bars, chance],
    ["position in the spectrum", { range: [0, 1] }],
    ["share of the TSDs", { tickformat: ".0%", rangemode: "tozero" }], { bargap: 0.12 });
}

function showLeftOut(model) {
  const reasons = new Map();
  for (const [name, reason] of Object.entries(model.left_out)) {
    reasons.set(reason, [...(reasons.get(reason) ?? []), name]);
  }
  $("left-out-section").hidden = reasons.size === 0;
  $("left-out-summary").textContent =
    `${counted(Object.keys(model.left_out).length, "weight")} not measured, for ${counted(reasons.size, "reason")}`;
  $("left-out").replaceChildren(...[...reasons].flatMap(([reason, names]) => [
    element("h3", {}, `${reason} (${names.length})`),
    element("ul", {}, ...names.map((name) => element("li", {}, name))),
  ]));
}

const MOST_PAIRS = 6;
function showOverlap() {
  const { tuned, shared, chance, random_change: random, weights } = data.overlap;
  $("overlap-section").hidden = weights.length === 0;
  if (weights.length === 0) return;
  $("overlap-lead").textContent =
    `The part of its TSDs that a weight has in common in two models, averaged over the ${weights.length} weights ` +
    `that all ${tuned.length} models changed. Random sets of the same size would share ${percent(mean(chance))}, ` +
    `those of two random changes ${percent(mean(random))}.`;
  const average = (a, b) => mean(shared.map((matrix) => matrix[a][b]));
  fill($("overlap"), ["Model", ...tuned.map((_, b) => letter(b))], tuned.map((name, a) => row(
    head(`${letter(a)}  ${name}`, "row"), ...tuned.map((_, b) => cell(a === b ? "–" : percent(average(a, b)))),
  )));
  drawOverlap(theme());
}

function drawOverlap(colours) {
  const { tuned, shared, chance, weights } = data.overlap;
  const layerOf = new Map(models.flatMap((model) => model.weights.map((weight) => [weight.name, weight.layer])));
  const layers = [...new Set(weights.map((name) => layerOf.get(name) ?? null))]
    .sort((a, b) => (a === null) - (b === null) || a - b);
  const members = layers.map((layer) => range(weights.length).filter((i) => (layerOf.get(weights[i]) ?? null) === layer));
  const byLayer = (value) => members.map((inside) => mean(inside.map(value)));
  const pairs = range(tuned.length).flatMap((a) => range(tuned.length - a - 1, a + 1).map((b) => [a, b]));
  const x = layers.map(layerName);
  const hovertemplate = "layer %{x}<br>%{y:.1%} shared";
  const traces = [];
  if (pairs.length <= MOST_PAIRS) {
    pairs.forEach(([a, b], i) => traces.push({
      x, y: byLayer((w) => shared[w][a][b]), name: `${letter(a)} and ${letter(b)}`, hovertemplate, ...series(colours, i),
    }));
    $("overlap-caption").textContent = "Shared TSDs by layer, for each pair of models";
  } else {
    const over = (choose) => byLayer((w) => choose(pairs.map(([a, b]) => shared[w][a][b])));
    const band = { x, mode: "lines", line: { color: colours.edge, width: 1, dash: "dot" }, hovertemplate };
    traces.push({ ...band, y: over((values) => Math.max(...values)), name: "highest pair" });
    traces.push({ x, y: over(mean), name: "mean of all pairs", hovertemplate, ...series(colours, 0) });
    traces.push({ ...band, y: over((values) => Math.min(...values)), name: "lowest pair" });
    $("overlap-caption").textContent = `Shared TSDs by layer, over the ${pairs.length} pairs of models`;
  }
  traces.push({ ...chanceLine(colours), x, y: byLayer((w) => chance[w]) });
  draw("overlap-layers", colours, traces, ["layer", { type: "category" }],
    ["shared TSDs", { tickformat: ".0%", range: [0, 1.03] }], { showlegend: true });
}

function showAgreement(weight, colours) {
  const { truth, predicted, true: size, steps, weights, precision, recall, chance, random_change: random } =
    data.agreement;
  $("agreement-section").hidden = false;
  $("agreement-lead").textContent =
    `At each recorded step, the ${predicted} directions of a weight with the highest change rates so far are the ` +
    `prediction; the truth is the ${size} highest of ${truth}. Precision is the part of the predicted directions ` +
    "that are true, recall the part of the true directions that were predicted. Lines are means over " +
    `${counted(weights.length, "weight")}; dotted, what a random choice would score` +
    (random ? "; dashed, what the highest rates of a random change of the weights would." : ".");
  const own = weight ? weights.indexOf(weight.name) : -1;
  $("agreement-weight").textContent = own >= 0
    ? `Thin line with open markers: ${weight.name}.`
    : weight ? `${weight.name} was not recorded.` : "";
  const asRecall = (values) => values.map((value) => Math.min(1, (value * predicted) / size));
  const panel = (id, values, level, randomLevel) => {
    const traces = [{ ...chanceLine(colours), x: steps, y: steps.map(() => mean(level)) }];
    if (randomLevel) {
      traces.push({ x: steps, y: steps.map(() => mean(randomLevel)), name: "random change", mode: "lines",
        line: { color: colours.ink, width: 1.5, dash: "dash" },
        hovertemplate: "a random change %{y:.1%}<extra></extra>" });
    }
    const hovertemplate = "step %{x}<br>%{y:.1%}";
    if (own >= 0) {
      const symbol = { symbol: "circle-open", size: 7, color: colours.ink };
      traces.push({ x: steps, y: values.map((at) => at[own]), name: "this weight", mode: "lines+markers",
        line: { color: colours.ink, width: 1 }, marker: symbol, hovertemplate });
    }
    traces.push({ x: steps, y: values.map(mean), name: "mean of all weights", hovertemplate, ...series(colours, 0) });
    draw(id, colours, traces, ["optimizer step"],
      ["", { tickformat: ".0%", range: [0, 1.03] }], { showlegend: true });
  };
  panel("precision", precision, chance, random);
  panel("recall", recall, asRecall(chance), random && asRecall(random));
}

if (data.agreement) followers.push((weight) => showAgreement(weight, theme()));
