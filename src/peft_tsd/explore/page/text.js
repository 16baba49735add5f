// Numbers and names as text, and elements of the page.

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

/** An element with attributes and children; strings become text nodes, so that no name is ever read as markup. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A name as text that may break after a slash, or a dot before no digit: numbers stay whole. */
function breakable(name) {
  return name.split(/(?<=\/|\.(?!\d))/).flatMap((part, i) => (i > 0 ? [element("wbr"), part] : [part]));
}

const row = (...cells) => element("tr", {}, ...cells);
const head = (text, scope = "col") => element("th", { scope }, ...(scope === "row" ? breakable(text) : [text]));
const cell = (text) => element("td", {}, text);

/** A share and its bar, on a scale from 0 to 100 %. */
function barCell(share) {
  if (!known(share)) return cell("–");
  const bar = element("i", { "aria-hidden": "true" });
  bar.style.width = `calc(${share} * (100% - 1.4rem))`;
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

const letter = (i) => (i < 26 ? String.fromCharCode(65 + i) : `M${i + 1}`);
const layerName = (layer) => (layer === null ? "–" : String(layer));
