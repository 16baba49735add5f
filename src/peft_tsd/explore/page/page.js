"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const models = data.models;
  const shown = { model: models[0], weight: null, scale: "linear" };

  // ---------------------------------------------------------------- numbers

  const known = (value) => value !== null && value !== undefined;

  function percent(share) {
    const value = 100 * share;
    if (value === 0 || value >= 9.95) return `${value.toFixed(0)}%`;
    return value < 0.01 ? "<0.01%" : `${Number(value.toPrecision(2))}%`;
  }

  function number(value, digits = 3) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e5) return Number(value.toPrecision(digits)).toExponential().replace("e+", "e");
    return Number(value.toPrecision(digits)).toString();
  }

  const range = (n, from = 0) => Array.from({ length: n }, (_, i) => from + i);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const counted = (n, noun) => (n === 1 ? `${n} ${noun}` : `${n} ${noun}s`);

  const decoded = new Map();

  /** The float32 array number `index` of the file. */
  function array(index) {
    if (!decoded.has(index)) {
      const bytes = Uint8Array.from(atob(data.arrays[index]), (letter) => letter.charCodeAt(0));
      // Read through a view: the file is little-endian whatever the machine is.
      const view = new DataView(bytes.buffer);
      decoded.set(index, Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true)));
    }
    return decoded.get(index);
  }

  // What the map can show. A logarithmic scale where weights differ by orders of magnitude.
  const QUANTITIES = [
    { key: "highest_8_rate", label: "Concentration: share of the 8 highest rates", text: percent },
    { key: "gini", label: "Gini coefficient of the rates", text: (value) => value.toFixed(2) },
    { key: "largest_rate", label: "Largest change rate", text: number, log: true },
    { key: "core_energy", label: "Core energy: share of ‖ΔW‖² on all core directions", text: percent, log: true },
    { key: "tsd_energy", label: "TSD energy: share of ‖ΔW‖² on the TSDs", text: percent, log: true },
    { key: "mean_position", label: "Mean position of the TSDs (0 largest σ, 1 smallest)", text: (value) => value.toFixed(2) },
    { key: "relative_change", label: "Relative change ‖ΔW‖ / ‖W‖", text: number, log: true },
  ];

  // ---------------------------------------------------------------- elements

  /** An element with attributes and children; strings become text nodes, so that no name is ever read as markup. */
  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  }

  /** A name as text that may break after a dot or a slash. */
  function breakable(name) {
    return name.split(/(?<=[./])/).flatMap((part, i) => (i > 0 ? [element("wbr"), part] : [part]));
  }

  const row = (...cells) => element("tr", {}, ...cells);
  const head = (text, scope = "col") => element("th", { scope }, ...(scope === "row" ? breakable(text) : [text]));
  const cell = (text) => element("td", {}, text);

  function barCell(share, largest) {
    const bar = element("i", { "aria-hidden": "true" });
    bar.style.width = `calc(${largest > 0 ? share / largest : 0} * (100% - 1.4rem))`;
    return element("td", { class: "bar-cell" }, percent(share), bar);
  }

  function fill(table, columns, rows) {
    table.replaceChildren(
      element("thead", {}, row(...columns.map((column) => head(column)))),
      element("tbody", {}, ...rows),
    );
  }

  function options(select, labels) {
    select.replaceChildren(...labels.map((label, i) => element("option", { value: i }, label)));
  }

  // ---------------------------------------------------------------- colours

  // Cividis: even steps of lightness, the same to every kind of colour vision.
  const CIVIDIS = ["00224e", "083370", "35456c", "4f576c", "666970", "7d7c78", "948e77", "aea371", "c8b866", "e5cf52",
    "fee838"].map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

  function cividis(part) {
    const at = Math.min(Math.max(part, 0), 1) * (CIVIDIS.length - 1);
    const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
    return CIVIDIS[low].map((value, i) => Math.round(value + (at - low) * (CIVIDIS[low + 1][i] - value)));
  }

  const css = (rgb) => `rgb(${rgb.join(", ")})`;

  function inkOn(rgb) {
    const [r, g, b] = rgb.map((value) => (value <= 10 ? value / 3294 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
  }

  /** The page's colours in the theme that is on. */
  function theme() {
    const probe = element("span", { hidden: true });
    document.body.append(probe);
    const colours = {};
    for (const name of ["paper", "ink", "soft", "line", "edge", "trace", "accent", "second", "third", "fourth"]) {
      probe.style.color = `var(--${name})`;
      colours[name] = getComputedStyle(probe).color;
    }
    probe.remove();
    return colours;
  }

  // ---------------------------------------------------------------- charts

  const CONFIG = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  };

  function axis(colours, title, more = {}) {
    return {
      title: { text: title, font: { color: colours.soft }, standoff: 8 },
      gridcolor: colours.line, linecolor: colours.edge, tickcolor: colours.edge, zeroline: false,
      tickfont: { color: colours.soft }, automargin: true, ...more,
    };
  }

  /** Draws a chart in the theme's colours; `x` and `y` are [title, further settings of the axis]. */
  function draw(id, colours, traces, x, y, more = {}) {
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.soft };
    const layout = {
      font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 12, r: 12, t: 28, b: 12 }, showlegend: false, hovermode: "closest", dragmode: "zoom",
      hoverlabel: { bgcolor: colours.paper, bordercolor: colours.edge, font: { ...font, color: colours.ink } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.edge, activecolor: colours.accent },
      legend: { orientation: "h", x: 0, y: 1.04, yanchor: "bottom", font },
      xaxis: axis(colours, x[0], { showgrid: false, showline: true, ticks: "outside", ...x[1] }),
      yaxis: axis(colours, y[0], y[1]),
      ...more,
    };
    const image = { format: "svg", filename: `peft-tsd-${id}`, width: 900, height: 420 };
    Plotly.react($(id), traces, layout, { ...CONFIG, toImageButtonOptions: image });
  }

  // ---------------------------------------------------------------- one model

  function showModel(model) {
    shown.model = model;
    $("tuned").replaceChildren(...breakable(model.tuned));
    $("base").textContent = `${model.base} · ${model.kind} · ${counted(model.weights.length, "weight")} measured`;
    $("finding").textContent = model.finding;
    $("eps").textContent = number(model.eps);
    $("num-directions").textContent = model.num_directions;
    $("facts").replaceChildren(
      ...model.facts.map(([value, what]) => element("div", {}, element("dt", {}, ...breakable(what)), element("dd", {}, value))),
    );
    const some = model.weights.length > 0;
    for (const id of ["map-section", "weight-section"]) $(id).hidden = !some;
    for (const id of ["concentration", "positions"]) $(id).closest("section").hidden = !some;
    showLeftOut(model);
    if (!some) {
      shown.weight = null;
      return;
    }
    options($("weight"), model.weights.map((weight) => weight.name));
    const named = (name) => model.weights.find((weight) => weight.name === name);
    shown.weight = (shown.weight && named(shown.weight.name)) || named(model.initial);
    showMap();
    showConcentration(model);
    showWeight(shown.weight);
    showPositions(model, theme());
  }

  // ---------------------------------------------------------------- the map

  const grid = { rows: [], buttons: new Map() };

  const quantity = () => QUANTITIES[$("quantity").value];
  const layerName = (layer) => (layer === null ? "–" : String(layer));

  /** Where values lie on the colour scale, 0 to 1; the same scale for all models, so that they compare. */
  function scaleOf({ key, log }) {
    const all = models.flatMap((model) => model.weights.map((weight) => weight[key])).filter(known);
    const positive = all.filter((value) => value > 0);
    const useLog = Boolean(log) && positive.length > 0;
    const from = useLog ? Math.min(...positive) : Math.min(...all);
    const to = Math.max(...all);
    const at = useLog ? (value) => Math.log(Math.max(value, from)) : (value) => value;
    const span = at(to) - at(from);
    return { from, to, useLog, part: (value) => (span > 0 ? (at(value) - at(from)) / span : 0.5) };
  }

  function showMap() {
    const { kinds, layers, weights } = shown.model;
    const at = new Map(weights.map((weight) => [JSON.stringify([weight.kind, weight.layer]), weight]));
    grid.rows = kinds.map(({ kind }) => layers.map((layer) => at.get(JSON.stringify([kind, layer])) ?? null));
    grid.buttons = new Map();
    const body = kinds.map(({ kind }, i) => row(
      head(kind, "row"),
      ...grid.rows[i].map((weight) => {
        if (weight === null) return cell("");
        const button = element("button", { type: "button", tabindex: -1 }, element("span", { "aria-hidden": "true" }));
        button.addEventListener("click", () => showWeight(weight));
        button.addEventListener("focus", () => readOut(weight));
        button.addEventListener("mouseenter", () => readOut(weight));
        button.addEventListener("mouseleave", () => readOut(shown.weight));
        grid.buttons.set(weight, button);
        return element("td", {}, button);
      }),
    ));
    const corner = element("th", { scope: "col", class: "corner" }, "Layer");
    const tops = layers.map((layer) => head(layerName(layer)));
    $("map").replaceChildren(element("thead", {}, row(corner, ...tops)), element("tbody", {}, ...body));
    paintMap();
  }

  function paintMap() {
    const what = quantity();
    const scale = scaleOf(what);
    for (const [weight, button] of grid.buttons) {
      const value = weight[what.key];
      const colour = known(value) ? cividis(scale.part(value)) : [127, 127, 127];
      button.style.background = css(colour);
      button.style.color = inkOn(colour);
      button.firstChild.textContent = known(value) ? short(value, what) : "–";
      button.setAttribute("aria-label", `${weight.name}: ${known(value) ? what.text(value) : "not defined"}`);
    }
    $("map").setAttribute("aria-label", what.label);
    $("map").classList.toggle("with-numbers", $("numbers").checked);
    $("legend-low").textContent = what.text(scale.from);
    $("legend-high").textContent = what.text(scale.to);
    $("legend-scale").textContent = scale.useLog ? "(log scale)" : "";
    $("ramp").style.background = `linear-gradient(to right, ${CIVIDIS.map(css).join(", ")})`;
    readOut(shown.weight);
  }

  /** A value in the few letters a cell has room for. */
  function short(value, what) {
    if (what.text === percent) return percent(value).replace("%", "");
    return number(value, 2).replace(/^0\./, ".");
  }

  function readOut(weight) {
    const what = quantity();
    const value = weight[what.key];
    const name = element("strong", {}, ...breakable(weight.name));
    $("readout").replaceChildren(name, `  ${known(value) ? what.text(value) : "not defined"}`);
  }

  function mark(weight) {
    for (const [other, button] of grid.buttons) {
      button.setAttribute("aria-pressed", other === weight);
      button.tabIndex = other === weight ? 0 : -1;
    }
    readOut(weight);
  }

  /** The next weight from `weight` in a direction of the map, over empty cells; null at its edge. */
  function neighbour(weight, down, right) {
    let i = grid.rows.findIndex((cells) => cells.includes(weight));
    let j = grid.rows[i].indexOf(weight);
    do {
      i += down;
      j += right;
      if (grid.rows[i]?.[j]) return grid.rows[i][j];
    } while (grid.rows[i] && j >= 0 && j < grid.rows[i].length);
    return null;
  }

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  $("map").addEventListener("keydown", (event) => {
    const line = grid.rows.find((cells) => cells.includes(shown.weight)).filter((weight) => weight !== null);
    let next = null;
    if (event.key in STEPS) next = neighbour(shown.weight, ...STEPS[event.key]);
    else if (event.key === "Home") next = line[0];
    else if (event.key === "End") next = line[line.length - 1];
    else return;
    event.preventDefault();
    if (next === null) return;
    showWeight(next);
    grid.buttons.get(next).focus();
  });

  // ---------------------------------------------------------------- one weight

  function showWeight(weight) {
    shown.weight = weight;
    $("weight").value = shown.model.weights.indexOf(weight);
    mark(weight);
    const [outputs, inputs] = weight.shape;
    $("weight-facts").textContent =
      `${outputs} × ${inputs} · ‖ΔW‖ / ‖W‖ = ${known(weight.relative_change) ? number(weight.relative_change) : "–"} · ` +
      `core directions hold ${percent(weight.core_energy)} of ‖ΔW‖² · Gini ${weight.gini.toFixed(2)}`;
    $("tail").textContent = weight.tail;
    const colours = theme();
    drawRates(weight, colours);
    showChoices(weight);
    showDirections(weight);
    if (data.agreement) showAgreement(weight, colours);
  }

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

  function showChoices(weight) {
    $("choices-lead").textContent =
      `What ${counted(weight.directions.length, "core direction")} carry, chosen in four ways: ` +
      "of the sum of the change rates, and of ‖ΔW‖².";
    const keys = Object.keys(CHOICES);
    const overall = (key) => mean(shown.model.weights.map((other) => other[key]));
    const columns = [
      (key) => weight[`${key}_rate`], (key) => weight[`${key}_energy`],
      (key) => overall(`${key}_rate`), (key) => overall(`${key}_energy`),
    ].map((value) => Object.fromEntries(keys.map((key) => [key, value(key)])));
    const rows = keys.map((key) => {
      const bars = columns.map((column) => barCell(column[key], Math.max(...Object.values(column))));
      return element("tr", { class: key === "tsd" ? "strong" : null }, head(CHOICES[key], "row"), ...bars);
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

  // ---------------------------------------------------------------- all weights

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

  // ---------------------------------------------------------------- several models

  const MOST_PAIRS = 6;
  const letter = (i) => (i < 26 ? String.fromCharCode(65 + i) : `M${i + 1}`);

  /** Series that differ in colour, dash and marker alike. */
  function series(colours, i) {
    const colour = [colours.accent, colours.second, colours.third, colours.fourth, colours.ink, colours.edge][i % 6];
    const dash = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"][i % 6];
    const symbol = ["circle", "square", "triangle-up", "x", "diamond", "cross"][i % 6];
    return { mode: "lines+markers", line: { color: colour, dash, width: 2 }, marker: { color: colour, symbol, size: 7 } };
  }

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
      ["shared TSDs", { tickformat: ".0%", rangemode: "tozero" }], { showlegend: true });
  }

  const chanceLine = (colours) => ({
    name: "chance", mode: "lines", line: { color: colours.edge, width: 1.5, dash: "dot" },
    hovertemplate: "chance %{y:.1%}<extra></extra>",
  });

  // ---------------------------------------------------------------- over training

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

  // ---------------------------------------------------------------- controls

  function redraw() {
    const colours = theme();
    if (shown.weight) {
      drawRates(shown.weight, colours);
      showPositions(shown.model, colours);
    }
    if (data.overlap && data.overlap.weights.length) drawOverlap(colours);
    if (data.agreement) showAgreement(shown.weight, colours);
  }

  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);

  function nameTheme() {
    $("theme").textContent = isDark() ? "Light theme" : "Dark theme";
  }

  /** Dark, light, or undefined: what the reader's system prefers. */
  function setTheme(name) {
    if (name) root.dataset.theme = name;
    else delete root.dataset.theme;
    nameTheme();
    redraw();
  }

  $("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  prefersDark.addEventListener("change", () => setTheme(root.dataset.theme));
  // Paper is white: a figure drawn for the dark theme would not be readable on it.
  let onScreen;
  addEventListener("beforeprint", () => {
    onScreen = root.dataset.theme;
    setTheme("light");
  });
  addEventListener("afterprint", () => setTheme(onScreen));
  $("model").addEventListener("change", (event) => showModel(models[event.target.value]));
  $("weight").addEventListener("change", (event) => showWeight(shown.model.weights[event.target.value]));
  $("quantity").addEventListener("change", paintMap);
  $("numbers").addEventListener("change", paintMap);
  for (const radio of document.querySelectorAll("input[name=scale]")) {
    radio.addEventListener("change", () => {
      shown.scale = radio.value;
      drawRates(shown.weight, theme());
    });
  }

  options($("quantity"), QUANTITIES.map(({ label }) => label));
  options($("model"), models.map((model) => `${model.tuned} (${model.kind})`));
  $("model-choice").hidden = models.length === 1;
  showModel(models[0]);
  if (data.overlap) showOverlap();
  if (data.agreement && !shown.weight) showAgreement(null, theme());
  nameTheme();
})();
