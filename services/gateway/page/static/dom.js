// Small tools for the page's elements.

export const by = (id) => document.getElementById(id);

/** Make an element with properties, attributes (`aria-…`, `role`, `scope`) and children. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** Set an element's text if it is another one, so that screen readers and layout have no work with the same text. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let announced = 0;

/** Tell screen readers something. */
export function announce(text) {
  const place = by("announce");
  place.textContent = "";
  clearTimeout(announced);
  announced = setTimeout(() => (place.textContent = text), 50);
}

/** Call `draw` once before the next frame, however often the returned function is called. */
export function perFrame(draw) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
}

/** Let arrow keys, Home and End move between the tabs of a list; `choose` is called with the tab. */
export function tabs(list, choose) {
  const all = [...list.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    for (const one of all) {
      one.setAttribute("aria-selected", String(one === tab));
      one.tabIndex = one === tab ? 0 : -1;
    }
    choose(tab);
  };
  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) select(tab);
  });
  list.addEventListener("keydown", (event) => {
    const at = all.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    const tab = all[(next + all.length) % all.length];
    select(tab);
    tab.focus();
  });
  return select;
}

/** Draw a legend of these origins with their counts. */
export function legend(list, origins, words, counts = null) {
  list.replaceChildren(
    ...origins.map((origin) =>
      el("li", {}, el("span", { className: `t ${origin}`, "aria-hidden": "true" }, "ab"), " ", words[origin], counts ? ` ${counts[origin]}` : ""),
    ),
  );
}

/** Draw counters: label, value, a note with a verdict (`good`, `bad` or none), and an explanation of the label. */
export function drawCounters(list, rows) {
  rows.forEach(([label, value, note = "", verdict = "", meaning = ""], i) => {
    let row = list.children[i];
    if (!row) {
      row = el("div", {}, el("dt"), el("dd"), el("dd", { className: "note" }));
      list.append(row);
    }
    const [term, shown, remark] = row.children;
    setText(term, label);
    if (row.title !== meaning) row.title = meaning;
    setText(shown, value);
    setText(remark, note);
    remark.className = `note ${verdict}`;
  });
  while (list.children.length > rows.length) list.lastChild.remove();
}
