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

  /* The figures' texts have the colour of the page's. */
  function draw(width) {
    const font = { color: getComputedStyle(root).getPropertyValue("--ink").trim() };
    for (const [id, { data, layout }] of Object.entries(plots)) {
      const place = document.getElementById("plot-" + id);
      place.querySelector(".waiting")?.remove();
      Plotly.react(place, data, { ...layout, width, autosize: width === undefined, font }, settings);
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

  /* What was drawn while it was folded has no width. */
  function resize(box) {
    for (const plot of box.querySelectorAll(".js-plotly-plot")) if (box.open) Plotly.Plots.resize(plot);
  }

  /* A table that does not scroll needs no stop of its own on the way through the page. */
  function stops() {
    for (const box of document.querySelectorAll(".scroll")) {
      if (box.clientWidth && box.scrollWidth <= box.clientWidth) box.removeAttribute("tabindex");
      else box.tabIndex = 0;
    }
  }
  window.addEventListener("resize", stops);
  for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", () => { stops(); resize(details); });

  for (const copy of document.querySelectorAll(".copy")) {
    const code = copy.parentElement.querySelector("code");
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      getSelection().selectAllChildren(code); /* where a file may not write to the clipboard, it is selected */
      await navigator.clipboard?.writeText(code.textContent).then(() => { copy.textContent = "Copied"; }, () => {});
    });
  }

  show(remembered.get());
  stops();
})();
