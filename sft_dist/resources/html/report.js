(() => {
  const svg = document.getElementById("curve");
  if (!svg) return;
  const [first, last] = JSON.parse(svg.dataset.span);
  const cursor = document.getElementById("cursor");
  const reading = document.getElementById("reading");
  const lines = [...svg.querySelectorAll("g[data-values]")].map((group) => ({
    name: group.dataset.name,
    values: JSON.parse(group.dataset.values),
  }));
  const nearest = (values, step) =>
    values.reduce((best, one) => (Math.abs(one[0] - step) < Math.abs(best[0] - step) ? one : best));
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = first + ((event.clientX - box.left) / box.width) * (last - first);
    const step = nearest(lines.flatMap((line) => line.values), wanted)[0];
    const x = `${((step - first) / (last - first)) * 100}%`;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    const found = lines.flatMap((line) => line.values.filter((one) => one[0] === step).map((one) => `${line.name} ${one[1].toPrecision(4)}`));
    reading.textContent = `step ${step.toLocaleString("en")}: ${found.join(", ")}`;
  };
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    reading.textContent = "";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
})();
