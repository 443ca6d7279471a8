// Hover values of charts: the nearest drawn point of every line. Everything else on the page works without this.
"use strict";
const wording = (v) => v === 0 ? "0" : Math.abs(v) >= 1e-3 ? v.toLocaleString("en", { maximumSignificantDigits: 4 }) : v.toExponential(1);
for (const svg of document.querySelectorAll(".chart svg")) {
  const lines = JSON.parse(svg.dataset.points), [low, high, start, end] = JSON.parse(svg.dataset.x);
  const figure = svg.closest("figure"), tip = figure.querySelector(".tip"), at = svg.querySelector(".at");
  const width = svg.viewBox.baseVal.width;
  const hide = () => { tip.hidden = true; at.style.visibility = "hidden"; };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * width;
    const wanted = low + (place - start) / (end - start || 1) * (high - low);
    let step = null;
    for (const [, , xs] of lines) for (const x of xs) if (step === null || Math.abs(x - wanted) < Math.abs(step - wanted)) step = x;
    if (step === null) return hide();
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: "step " + step.toLocaleString("en") }));
    const reach = (high - low) / 40;
    for (const [name, colour, xs, ys] of lines) {
      let best = -1;
      xs.forEach((x, i) => { if (Math.abs(x - step) <= reach && (best < 0 || Math.abs(x - step) < Math.abs(xs[best] - step))) best = i; });
      if (best < 0) continue;
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.className = "dot c" + colour;
      row.append(dot, name + " " + wording(ys[best]));
      tip.append(row);
    }
    tip.hidden = false;
    const x = start + (step - low) / (high - low || 1) * (end - start);
    at.setAttribute("transform", "translate(" + x + ",0)");
    at.style.visibility = "visible";
    const left = box.left - figure.getBoundingClientRect().left + x / width * box.width;
    const far = left + 12 + tip.offsetWidth > figure.clientWidth;
    tip.style.left = Math.max(4, far ? left - 12 - tip.offsetWidth : left + 12) + "px";
    tip.style.top = svg.offsetTop + 14 + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
// Words over a picture: the regions that a word goes to, by their shares.
for (const card of document.querySelectorAll(".moved")) {
  const rows = [...card.querySelectorAll("tr[data-shares]")], marks = card.querySelectorAll("rect");
  const show = (row) => {
    rows.forEach((other) => other.classList.toggle("on", other === row));
    JSON.parse(row.dataset.shares).forEach((share, i) => { if (marks[i]) marks[i].style.opacity = share * 0.75; });
  };
  for (const row of rows) for (const what of ["pointerenter", "focus", "click"]) row.addEventListener(what, () => show(row));
  const most = (row) => Math.max(...JSON.parse(row.dataset.shares));
  if (rows.length) show(rows.reduce((best, row) => most(row) > most(best) ? row : best));
}
