(() => {
  const percent = (share) => `${share * 100}%`;
  const short = (value, gap) => {
    const size = Math.abs(value);
    if (size && (size >= 1e6 || gap < 1e-4)) return Number(value.toPrecision(4)).toString();
    return value.toLocaleString("en", { maximumFractionDigits: Math.max(0, Math.ceil(-Math.log10(gap)) + 1) });
  };
  const set = (element, values) => {
    for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
  };

  const follow = (figure) => {
    const full = JSON.parse(figure.dataset.span); // first and last step, lowest and highest value of the axes
    let view = [...full];
    const svg = figure.querySelector("svg");
    const [cursor, band, reading] = [".cursor", ".band", "output"].map((name) => figure.querySelector(name));
    const lines = [...svg.querySelectorAll("g[data-values]")].map((group) => ({
      name: group.dataset.name,
      values: JSON.parse(group.dataset.values),
      box: group.querySelector("svg"),
      dots: [...group.querySelectorAll("circle")].map((dot) => [dot, parseFloat(dot.getAttribute("cx")) / 100, parseFloat(dot.getAttribute("cy")) / 100]),
    }));
    // As they were drawn, to come back to.
    const ticks = [...svg.querySelectorAll(".level, .step")].map((tick) => [tick, tick.cloneNode(true)]);

    const zoom = (first, last) => {
      const inside = lines.flatMap((line) => line.values).filter(([step]) => step >= first && step <= last).map(([, value]) => value);
      if (inside.length < 2) return;
      const [low, high] = [Math.min(...inside), Math.max(...inside)];
      const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
      view = [first, last, low - room, high + room];
      draw();
      for (const kind of ["level", "step"]) {
        const found = ticks.map(([tick]) => tick).filter((tick) => tick.classList.contains(kind));
        found.forEach((tick, index) => {
          const share = index / Math.max(1, found.length - 1);
          const [line, text] = tick.children;
          if (kind === "step") {
            set(line, { x1: percent(share), x2: percent(share) });
            text.setAttribute("x", percent(share));
            text.textContent = Math.round(first + share * (last - first)).toLocaleString("en");
          } else {
            set(line, { y1: percent(1 - share), y2: percent(1 - share) });
            text.setAttribute("y", percent(1 - share));
            text.textContent = short(view[2] + share * (view[3] - view[2]), (view[3] - view[2]) / found.length);
          }
        });
      }
    };
    const draw = () => {
      const wide = (view[1] - view[0]) / (full[1] - full[0]);
      const tall = (view[3] - view[2]) / (full[3] - full[2]);
      const left = (view[0] - full[0]) / (full[1] - full[0]);
      const top = (full[3] - view[3]) / (full[3] - full[2]);
      for (const line of lines) {
        line.box.setAttribute("viewBox", [left, top, wide, tall].map((part) => part * 1000).join(" "));
        for (const [dot, x, y] of line.dots) {
          const [across, down] = [(x - left) / wide, (y - top) / tall];
          set(dot, { cx: percent(across), cy: percent(down), visibility: across < 0 || across > 1 ? "hidden" : "visible" });
        }
      }
    };
    const back = () => {
      view = [...full];
      draw();
      ticks.forEach(([tick, was]) => tick.replaceChildren(...was.cloneNode(true).childNodes));
    };

    const share = (event) => {
      const box = svg.getBoundingClientRect();
      return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    };
    const step = (at) => view[0] + at * (view[1] - view[0]);
    let from = null;
    const show = (event) => {
      const wanted = step(share(event));
      const seen = lines.flatMap((line) => line.values).filter(([at]) => at >= view[0] && at <= view[1]);
      if (!seen.length) return;
      const nearest = seen.reduce((best, one) => (Math.abs(one[0] - wanted) < Math.abs(best[0] - wanted) ? one : best))[0];
      const x = percent((nearest - view[0]) / (view[1] - view[0]));
      set(cursor, { x1: x, x2: x, visibility: "visible" });
      const found = lines.flatMap((line) => line.values.filter((one) => one[0] === nearest).map((one) => `${line.name} ${one[1].toPrecision(4)}`));
      reading.textContent = `step ${nearest.toLocaleString("en")}: ${found.join(", ")}`;
      if (from !== null) {
        const [low, high] = [Math.min(from, share(event)), Math.max(from, share(event))];
        set(band, { x: percent(low), width: percent(high - low), visibility: "visible" });
      }
    };
    const hide = () => {
      from = null;
      cursor.setAttribute("visibility", "hidden");
      band.setAttribute("visibility", "hidden");
      reading.textContent = "";
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", (event) => {
      from = share(event);
      show(event);
    });
    svg.addEventListener("pointerup", (event) => {
      const [low, high] = from === null ? [0, 0] : [Math.min(from, share(event)), Math.max(from, share(event))];
      from = null;
      band.setAttribute("visibility", "hidden");
      if (high - low > 0.02) zoom(step(low), step(high));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("dblclick", back);
  };

  document.querySelectorAll("figure.curve").forEach(follow);
})();
