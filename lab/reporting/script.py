"""The page's script: sorting, filtering, hovering by pointer, touch and keys, and renewal while the sweep runs.

It writes text as text only, so what a name holds stays a name.
"""

SCRIPT = """
const all = (what, within = document) => [...within.querySelectorAll(what)];
const saved = key => { try { return JSON.parse(sessionStorage.getItem(location.pathname + key)); } catch { return null; } };
const save = (key, value) => { try { sessionStorage.setItem(location.pathname + key, JSON.stringify(value)); } catch {} };

function sort(table, i, down) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[i].setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[i].dataset.v;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = isFinite(x) && isFinite(y);
    const order = numbers ? x - y : x.localeCompare(y, undefined, { numeric: true });
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows);
}
const tables = all("table.sortable");
tables.forEach((table, t) => {
  [...table.tHead.rows[0].cells].forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    sort(table, i, down);
    save("sort" + t, [i, down]);
  }));
  const last = saved("sort" + t);
  if (last && table.tHead.rows[0].cells[last[0]]) sort(table, ...last);
});

const form = document.querySelector("form.filters");
if (form) {
  const word = form.querySelector("input"), selects = all("select", form), told = form.querySelector("output");
  const cells = all("#cells tbody tr"), others = all("tr[data-c]").filter(row => !row.closest("#cells"));
  const lower = new Map([...cells, ...others].map(row => [row, row.textContent.toLowerCase()]));
  const filter = () => {
    const text = word.value.toLowerCase(), chosen = selects.filter(select => select.value !== "");
    const fits = new Set(), shown = new Set();
    for (const row of cells) {
      if (chosen.every(select => "=" + row.cells[+select.dataset.k].dataset.v === select.value)) {
        fits.add(row.dataset.c);
        if (lower.get(row).includes(text)) shown.add(row.dataset.c);
      }
      row.hidden = !shown.has(row.dataset.c);
    }
    const none = !text && !chosen.length;
    for (const row of others) {
      const c = row.dataset.c;
      row.hidden = !(none || shown.has(c) || ((fits.has(c) || !chosen.length) && lower.get(row).includes(text)));
    }
    all("svg [data-c]").forEach(mark => mark.classList.toggle("off", !none && !shown.has(mark.dataset.c)));
    told.textContent = none ? "" : shown.size + " of " + cells.length + " listed cells";
    save("filter", [word.value, ...selects.map(select => select.value)]);
  };
  const last = saved("filter");
  if (last) [word, ...selects].forEach((field, i) => { if (last[i] !== undefined) field.value = last[i]; });
  selects.forEach(select => { if (select.selectedIndex < 0) select.value = ""; });
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  form.hidden = false;
  if (last) filter();
}

all("[data-tabs]").forEach((box, t) => {
  const parts = all("[data-tab]", box), bar = document.createElement("div");
  bar.className = "tabs";
  const show = i => {
    parts.forEach((part, j) => part.hidden = i !== j);
    [...bar.children].forEach((button, j) => button.setAttribute("aria-pressed", i === j));
    save("tab" + t, i);
  };
  parts.forEach((part, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = part.dataset.tab;
    button.addEventListener("click", () => show(i));
    bar.append(button);
  });
  if (parts.length > 1) { box.prepend(bar); show(Math.min(saved("tab" + t) || 0, parts.length - 1)); }
});

const tip = document.getElementById("tip");
let at = null;
function point(mark, x, y) {
  if (at) at.classList.remove("at");
  at = mark;
  tip.hidden = !mark;
  if (!mark) return;
  mark.classList.add("at");
  tip.textContent = mark.dataset.tip;
  const box = mark.getBoundingClientRect(), size = tip.getBoundingClientRect();
  if (x === undefined) { x = box.left + box.width / 2; y = box.top; }
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - size.width - 4)) + "px";
  tip.style.top = (y - size.height - 12 > 4 ? y - size.height - 12 : y + 16) + "px";
}
const found = event => event.target.closest ? event.target.closest("[data-tip]") : null;
document.addEventListener("pointermove", event => {
  const mark = found(event);
  if (mark || (at && !(document.activeElement instanceof SVGElement))) point(mark, event.clientX, event.clientY);
});
document.addEventListener("pointerdown", event => point(found(event), event.clientX, event.clientY));
document.addEventListener("scroll", () => point(null), true);
all("svg[tabindex]").forEach(svg => {
  const marks = () => all("[data-tip]:not(.off)", svg);
  svg.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") point(null);
    if (!step || !marks().length) return;
    event.preventDefault();
    const some = marks(), i = some.indexOf(at);
    point(some[i < 0 ? (step > 0 ? 0 : some.length - 1) : (i + step + some.length) % some.length]);
  });
  svg.addEventListener("blur", () => point(null));
});

const every = +document.documentElement.dataset.live;
if (every) setInterval(() => {
  const busy = document.activeElement && document.activeElement.matches("input, select, svg");
  if (document.visibilityState === "visible" && !busy && !String(getSelection())) location.reload();
}, every * 1000);
"""
