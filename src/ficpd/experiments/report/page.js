"use strict";
(() => {
  const root = document.documentElement;
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const settings = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
  const remembered = {
    get: () => { try { return localStorage.getItem("ficpd-theme"); } catch { return null; } },
    set: (theme) => { try { localStorage.setItem("ficpd-theme", theme); } catch { /* a file may have no storage */ } },
  };

  /* A copy of a figure with its colours, which name properties of the page's style, put in. */
  function coloured(value, style) {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() || value : value;
    if (Array.isArray(value)) return value.map((item) => coloured(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
  }

  function axis(given, style) {
    const soft = style.getPropertyValue("--soft").trim();
    const line = style.getPropertyValue("--line").trim();
    return {
      gridcolor: line, linecolor: line, zerolinecolor: line, zeroline: false, tickfont: { color: soft }, fixedrange: true,
      ...given,
      title: { font: { size: 13, color: soft }, standoff: 12, ...given.title },
    };
  }

  function draw(width) {
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--ink").trim();
    const panel = style.getPropertyValue("--panel").trim();
    for (const [id, plot] of Object.entries(plots)) {
      const place = document.getElementById("plot-" + id);
      place.querySelector(".waiting")?.remove();
      const layout = coloured(plot.layout, style);
      Plotly.react(place, coloured(plot.data, style), {
        ...layout,
        width,
        autosize: width === undefined,
        dragmode: false,
        hovermode: "closest",
        font: { family: style.getPropertyValue("--sans").trim(), size: 13, color: ink },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        hoverlabel: { bgcolor: ink, bordercolor: ink, font: { color: panel }, align: "left" },
        xaxis: axis(layout.xaxis, style),
        yaxis: axis(layout.yaxis, style),
      }, settings);
    }
  }

  const button = document.getElementById("theme");

  function show(theme) {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    button.setAttribute("aria-pressed", String((theme || (system.matches ? "dark" : "light")) === "dark"));
    draw();
  }

  button.hidden = false;
  button.addEventListener("click", () => {
    const theme = button.getAttribute("aria-pressed") === "true" ? "light" : "dark";
    remembered.set(theme);
    show(theme);
  });
  system.addEventListener("change", () => show(root.dataset.theme));

  /* Paper is white and about 17 cm wide. */
  let before;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    draw(640);
  });
  window.addEventListener("afterprint", () => show(before));

  /* A table that does not scroll needs no stop of its own on the way through the page. */
  function stops() {
    for (const box of document.querySelectorAll(".scroll")) {
      if (box.clientWidth && box.scrollWidth <= box.clientWidth) box.removeAttribute("tabindex");
      else box.tabIndex = 0;
    }
  }
  window.addEventListener("resize", stops);
  for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", stops);

  show(remembered.get());
  stops();
})();
