"use strict";

// Values under the pointer, for every chart that carries them.
for (const chart of document.querySelectorAll(".chart")) {
  const source = chart.querySelector("script");
  if (!source) continue;
  const { domain, lines } = JSON.parse(source.textContent);
  const [plot, cursor, tip] = [".plot", ".cursor", ".tip"].map((name) => chart.querySelector(name));
  const labels = [...chart.querySelectorAll(".legend li")].map((item) => item.firstChild.nextSibling.textContent.trim());
  const title = chart.querySelector("h3").firstChild.textContent.trim();
  const xLabel = chart.querySelector(".x-label").textContent;
  const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const share = (x) => (domain[1] === domain[0] ? 0.5 : (x - domain[0]) / (domain[1] - domain[0]));

  const row = (left, right) => {
    const element = document.createElement("div");
    for (const text of [left, right]) {
      const span = document.createElement("span");
      span.textContent = text;
      element.append(span);
    }
    return element;
  };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = (event.clientX - box.left) / box.width;
    const x = xs.reduce((best, next) => (Math.abs(share(next) - wanted) < Math.abs(share(best) - wanted) ? next : best));
    const rows = lines.flatMap((line, index) => {
      const at = line.x.indexOf(x);
      return at < 0 ? [] : [row(labels[index] ?? title, line.text[at])];
    });
    tip.replaceChildren(row(xLabel, x.toLocaleString("en")), ...rows);
    cursor.hidden = tip.hidden = false;
    cursor.style.left = `${100 * share(x)}%`;
    // Right of the line, else left of it, else wherever it fits.
    const at = share(x) * box.width;
    const room = box.width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, at + 8 <= room ? at + 8 : Math.min(at - 8 - tip.offsetWidth, room))}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}

// The filter of the configuration.
const filter = document.querySelector(".filter input");
filter?.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  for (const item of document.querySelectorAll(".config > div")) {
    item.hidden = !item.textContent.toLowerCase().includes(wanted);
  }
});

// Nothing stays folded on paper.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
