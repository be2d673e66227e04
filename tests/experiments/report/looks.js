/* What a test asks of a page that is open: `page.evaluate("() => (LOOKS).figures()")`. */
({
  /* Relative luminance and contrast, as WCAG 2.2 defines them. */
  luminance([r, g, b]) {
    const linear = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  },
  ratio(one, other) {
    const [light, dark] = [this.luminance(one), this.luminance(other)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  },
  parsed: (text) => (text.match(/[\d.]+/g) || []).map(Number),
  hex: (text) => [1, 3, 5].map((i) => parseInt(text.trim().slice(i, i + 2), 16)),

  /* Each figure: how wide it is drawn, and how many marks of data it has. */
  figures() {
    const marks = ".trace path, .trace .point, .boxlayer path, .scatterlayer path, .barlayer path";
    return [...document.querySelectorAll(".plot")].filter((place) => place.checkVisibility()).map((place) => {
      const svg = place.querySelector("svg.main-svg"), box = place.getBoundingClientRect();
      const shown = [...place.querySelectorAll(marks)].filter((mark) => mark.getBoundingClientRect().width > 0);
      return { id: place.id, wide: svg ? svg.getBoundingClientRect().width : 0, room: box.width, right: box.right, marks: shown.length };
    });
  },

  /* The opaque colour that lies behind an element. */
  behind(node) {
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, a = 1] = this.parsed(getComputedStyle(at).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  },

  /* Texts whose contrast is below AA. */
  faint() {
    const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode()); ) {
      const of = node.parentElement, style = getComputedStyle(of), drawn = of.closest("svg");
      if (!node.textContent.trim() || !of.checkVisibility()) continue;
      if (of.closest("script, style, .skip, .hidden")) continue;
      const ratio = this.ratio(this.parsed(drawn ? style.fill : style.color), this.behind(drawn ? drawn.closest(".plot") : of));
      const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      if (ratio < (large ? 3 : 4.5)) found.push([node.textContent.trim().slice(0, 40), of.tagName, ratio.toFixed(2)]);
    }
    return found;
  },

  template: () => Object.values(JSON.parse(document.getElementById("plots").textContent))[0].layout.template,

  /* The contrast of each colour of data with the panel. */
  colours() {
    const panel = this.hex(getComputedStyle(document.documentElement).getPropertyValue("--panel"));
    return this.template().layout.colorway.map((colour) => this.ratio(this.hex(colour), panel));
  },

  stops: () => [...document.querySelectorAll('a[href], button, summary, [tabindex="0"]')].filter((e) => e.checkVisibility()).length,

  /* Where the keyboard is, and whether that can be seen. */
  focused() {
    const at = document.activeElement, style = getComputedStyle(at);
    return [at.tagName, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
  },
})
