// Hovering a chart: a line at the nearest point, and its label below the chart.
for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const points = JSON.parse(svg.dataset.hover);
  const cursor = svg.querySelector(".cursor");
  const readout = svg.closest("figure").querySelector(".readout");
  const nearest = (x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const [x, label] = nearest(((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.opacity = 1;
    readout.textContent = label;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.opacity = 0;
    readout.textContent = "\u00a0";
  });
}
