"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const paper = document.getElementById("charts");

  /** Axes and text in the page's own colours, which follow the reader's light or dark setting. */
  function themed(layout) {
    const style = getComputedStyle(document.body);
    const ink = style.color;
    const line = getComputedStyle(document.querySelector("td, th")).borderBottomColor;
    const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
    return {
      ...layout,
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
      font: { color: ink, family: style.fontFamily, size: 12 },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      margin: { l: 50, r: 10, t: 10, b: 40 },
      legend: { orientation: "h", y: -0.25 },
    };
  }

  // All places first: a chart takes the width that its place has when it is drawn.
  const places = charts.map((chart) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const place = document.createElement("div");
    caption.textContent = chart.caption;
    place.className = "chart";
    figure.append(caption, place);
    paper.append(figure);
    return place;
  });
  const redraws = charts.map((chart, i) => {
    const place = places[i];
    Plotly.newPlot(place, chart.data, themed(chart.layout), { responsive: true, displaylogo: false });
    return () => Plotly.relayout(place, themed(chart.layout));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((redraw) => redraw()));
})();
