// From the data to the page, and its controls.

function showModel(model) {
  shown.model = model;
  $("tuned").replaceChildren(...breakable(model.tuned));
  $("base").textContent = `${model.base} · ${model.kind} · ${counted(model.weights.length, "weight")} measured`;
  $("finding").textContent = model.finding;
  $("meaning").textContent = model.meaning;
  $("meaning-line").hidden = model.meaning === "";
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
  choose(shown.weight);
  showPositions(model, theme());
}

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
$("weight").addEventListener("change", (event) => choose(shown.model.weights[event.target.value]));
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
