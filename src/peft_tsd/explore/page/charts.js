// Colours, and charts by plotly in the page's own.

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

/** Series that differ in colour, dash and marker alike. */
function series(colours, i) {
  const colour = [colours.accent, colours.second, colours.third, colours.fourth, colours.ink, colours.edge][i % 6];
  const dash = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"][i % 6];
  const symbol = ["circle", "square", "triangle-up", "x", "diamond", "cross"][i % 6];
  return { mode: "lines+markers", line: { color: colour, dash, width: 2 }, marker: { color: colour, symbol, size: 7 } };
}

const chanceLine = (colours) => ({
  name: "chance", mode: "lines", line: { color: colours.edge, width: 1.5, dash: "dot" },
  hovertemplate: "chance %{y:.1%}<extra></extra>",
});
