// Reads out what lies under the pointer, or moves with the arrow keys, on all charts at once.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = [...document.querySelectorAll(".chart[data-key]")];
  const axis = () => document.querySelector('input[name="x"]:checked')?.value ?? "steps";
  const units = [["Y", 1e24], ["Z", 1e21], ["E", 1e18], ["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6]];
  const words = (v) => {
    if (v === null || v === undefined) return "–";
    const big = units.find(([, size]) => Math.abs(v) >= size);
    if (big) return (v / big[1]).toPrecision(4) + big[0];
    if (v !== 0 && Math.abs(v) < 1e-3) return v.toExponential(2);
    return Number.isInteger(v) ? v.toLocaleString("en") : v.toPrecision(4);
  };
  const clock = (s) => {
    const [h, m, r] = [Math.floor(s / 3600), Math.floor(s / 60) % 60, Math.round(s % 60)];
    return (h ? h + ":" + String(m).padStart(2, "0") : m) + ":" + String(r).padStart(2, "0");
  };
  const nearest = (xs, x) => {
    let [low, high] = [0, xs.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] === null || xs[middle] <= x) low = middle; else high = middle;
    }
    return x - xs[low] < xs[high] - x ? low : high;
  };
  const line = (text, run) => {
    const span = document.createElement("span");
    if (run !== null) {
      const key = document.createElement("i");
      key.className = "key c" + run % 6;
      span.append(key);
    }
    span.append(text);
    return span;
  };
  let share = null;
  const show = () => {
    const on = axis(), end = data.ends[on];
    for (const chart of charts) {
      const readout = chart.querySelector(".readout"), cursor = chart.querySelector(".cursor");
      cursor.style.display = share === null ? "none" : "block";
      if (share === null) { readout.replaceChildren(...(chart.still ?? [])); continue; }
      cursor.style.left = 100 * share + "%";
      const shown = [];
      data.runs.forEach((run, number) => {
        const xs = run[on], last = xs.length - 1;
        if (last < 0 || share * end > xs[last] + 0.02 * end) return;
        const at = nearest(xs, share * end);
        if (!shown.length) shown.push(line(on === "time" ? clock(xs[at]) : words(xs[at]) + " " + on, null));
        const value = run[chart.dataset.key]?.[at];
        const soft = chart.dataset.key === "loss" ? ", smooth " + words(run.smooth[at]) : "";
        shown.push(line((data.runs.length > 1 ? run.name + " " : "") + words(value) + soft, number));
      });
      readout.replaceChildren(...shown);
    }
  };
  const to = (x) => { share = x === null ? null : Math.min(1, Math.max(0, x)); show(); };
  for (const chart of charts) {
    chart.still = [...chart.querySelector(".readout").childNodes];
    const area = chart.querySelector(".area");
    const follow = (event) => {
      const box = area.getBoundingClientRect();
      to((event.clientX - box.left) / box.width);
    };
    area.addEventListener("pointermove", follow);
    area.addEventListener("pointerdown", follow);
    area.addEventListener("pointerleave", () => to(null));
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -0.01, ArrowRight: 0.01 }[event.key];
      if (step) { event.preventDefault(); to((share ?? 0.5) + step); }
      if (event.key === "Escape") to(null);
    });
    chart.addEventListener("blur", () => to(null));
  }
  for (const input of document.querySelectorAll('input[name="x"]')) input.addEventListener("change", show);
})();
