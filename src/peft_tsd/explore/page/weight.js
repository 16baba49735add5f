// One weight: its rates, other choices of directions, its task-specific ones.

function showWeight(weight) {
  $("weight").value = shown.model.weights.indexOf(weight);
  const [outputs, inputs] = weight.shape;
  $("weight-facts").textContent =
    `${outputs} × ${inputs} · ‖ΔW‖ / ‖W‖ = ${known(weight.relative_change) ? number(weight.relative_change) : "–"} · ` +
    `core directions hold ${percent(weight.core_energy)} of ‖ΔW‖² · Gini ${weight.gini.toFixed(2)}`;
  $("tail").textContent = weight.tail;
  const colours = theme();
  drawRates(weight, colours);
  showChoices(weight);
  showDirections(weight);
}

followers.push(showWeight);

function drawRates(weight, colours) {
  const sigma = array(weight.sigma);
  const rates = array(weight.rates);
  const k = rates.length;
  const hover = "direction %{customdata[0]}<br>σ %{customdata[1]:.4g}<br>rate %{y:.4g}<extra></extra>";
  const line = { color: colours.trace, width: 1.25 };
  const marker = { symbol: "diamond", size: 9, color: colours.accent, line: { color: colours.paper, width: 1 } };

  /** The rates of `indices` at the places `x`, and the TSDs among them marked. */
  const traces = (indices, x, mode) => {
    const trace = (chosen, style) => ({
      type: "scatter", hovertemplate: hover, ...style,
      x: chosen.map((at) => x[at]), y: chosen.map((at) => rates[indices[at]]),
      customdata: chosen.map((at) => [indices[at], sigma[indices[at]]]),
    });
    const all = range(indices.length);
    const tsd = new Set(weight.directions);
    return [
      trace(all, { name: "all", mode, line, marker: { color: colours.trace, size: 3.5 } }),
      trace(all.filter((at) => tsd.has(indices[at])), { name: "tsd", mode: "markers", marker }),
    ];
  };
  const y = ["change rate", { type: shown.scale, ...(shown.scale === "linear"
    ? { rangemode: "tozero" } : { exponentformat: "power", dtick: 1 }) }];
  const spectrum = range(k);
  const last = range(weight.tail, k - weight.tail);
  const sorted = range(k).sort((a, b) => rates[b] - rates[a]);
  const direction = "direction (0: the largest singular value)";
  draw("spectrum", colours, traces(spectrum, spectrum, "lines"), [direction], y);
  draw("zoom", colours, traces(last, last, "lines+markers"), ["direction"], y);
  // Ranks spread over orders of magnitude as rates do: only a logarithmic axis keeps the first few apart.
  draw("sorted", colours, traces(sorted, range(k, 1), "lines"), ["rank of the rate", { type: shown.scale }], y);
}

const CHOICES = {
  tsd: "TSDs (highest rates)", top: "Top (largest σ)", bottom: "Bottom (smallest σ)", random: "At random",
};

// Pairs that are not of the weight's core, and so have no change rate.
const OTHERS = { best: "Of ΔW itself (its largest)", gradient: "Of the gradient" };

function showChoices(weight) {
  $("choices-lead").textContent =
    `What ${counted(weight.directions.length, "core direction")} carry, chosen in four ways: ` +
    "of the sum of the change rates, and of ‖ΔW‖². Below them, as many rank-one directions that are not of the core.";
  const others = Object.keys(OTHERS).filter((key) => shown.model.weights.some((other) => known(other[`${key}_energy`])));
  const keys = [...Object.keys(CHOICES), ...others];
  const overall = (key) => {
    const values = shown.model.weights.map((other) => other[key]).filter(known);
    return values.length > 0 ? mean(values) : null;
  };
  const columns = [
    (key) => weight[`${key}_rate`], (key) => weight[`${key}_energy`],
    (key) => overall(`${key}_rate`), (key) => overall(`${key}_energy`),
  ].map((value) => Object.fromEntries(keys.map((key) => [key, value(key)])));
  const rows = keys.map((key) => {
    const bars = columns.map((column) => barCell(column[key]));
    const name = CHOICES[key] ?? OTHERS[key];
    return element("tr", { class: key === "tsd" ? "strong" : null }, head(name, "row"), ...bars);
  });
  fill($("choices"), ["Directions", "Rates", "‖ΔW‖²", "Rates", "‖ΔW‖²"], rows);
  const group = (text) => element("th", { scope: "colgroup", colspan: 2, class: "group" }, text);
  $("choices").tHead.prepend(row(element("td", { class: "group" }), group("this weight"), group("mean of all")));
}

function showDirections(weight) {
  const sigma = array(weight.sigma);
  const total = array(weight.rates).reduce((sum, rate) => sum + rate, 0);
  fill($("directions"), ["Direction", "Position", "σ", "Rate", "Share of rates"],
    weight.directions.map((index, i) => row(
      head(String(index), "row"), cell(weight.direction_positions[i].toFixed(3)), cell(number(sigma[index])),
      cell(number(weight.direction_rates[i])), cell(percent(total > 0 ? weight.direction_rates[i] / total : 0)),
    )));
}
