// The map of all weights.

// What the map can show. Parts of a whole on a scale from nothing to all, so that a colour means the same in every
// report; a logarithmic scale where weights differ by orders of magnitude.
const QUANTITIES = [
  { key: "highest_8_rate", label: "Concentration: share of the 8 highest rates", text: percent, part: true },
  { key: "gini", label: "Gini coefficient of the rates", text: (value) => value.toFixed(2), part: true },
  { key: "largest_rate", label: "Largest change rate", text: number, log: true },
  { key: "core_energy", label: "Core energy: share of ‖ΔW‖² on all core directions", text: percent, part: true },
  { key: "tsd_energy", label: "TSD energy: share of ‖ΔW‖² on the TSDs", text: percent, part: true },
  { key: "mean_position", label: "Mean position of the TSDs (0 largest σ, 1 smallest)", text: (value) => value.toFixed(2), part: true },
  { key: "relative_change", label: "Relative change ‖ΔW‖ / ‖W‖", text: number, log: true },
];

const grid = { rows: [], buttons: new Map() };

const quantity = () => QUANTITIES[$("quantity").value];

/** Where values lie on the colour scale, 0 to 1; the same scale for all models, so that they compare. */
function scaleOf({ key, log, part }) {
  if (part) return { from: 0, to: 1, useLog: false, part: (value) => value };
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
      button.addEventListener("click", () => choose(weight));
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

followers.push(mark);

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
  choose(next);
  grid.buttons.get(next).focus();
});
