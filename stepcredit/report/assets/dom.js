// Elements from text: data only ever becomes text or an attribute, never markup.

function element(space, tag, attributes, children) {
  const made = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, each] of Object.entries(value)) made.style.setProperty(key, each);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}
const el = (tag, attributes, ...children) => element(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => element("http://www.w3.org/2000/svg", tag, attributes, children);
const byId = (id) => document.getElementById(id);

// A number as text: five significant digits; with a sign where the sign matters.
function num(value, signed = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const text = value === 0 ? "0" : Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6 ? value.toExponential(3) : String(Number(value.toPrecision(5)));
  return (signed && value > 0 ? "+" : "") + text.replaceAll("-", "−");
}
const short = (value, signed = false) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(2);
  return (signed && value > 0 ? "+" : "") + text.replaceAll("-", "−");
};
const percent = (value) => (value === null || Number.isNaN(value) ? "–" : `${(100 * value).toFixed(1)}%`);

// One of several, as buttons; arrows move between them.
function pills(label, choices, chosen, choose) {
  const box = el("div", {class: "pills", role: "radiogroup", "aria-label": label});
  for (const [value, text] of choices)
    box.append(el("button", {role: "radio", "aria-checked": String(value === chosen), tabindex: value === chosen ? 0 : -1, "data-value": value, onclick: () => choose(value)}, text));
  box.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    const place = choices.findIndex(([value]) => value === chosen), next = choices[(place + step + choices.length) % choices.length][0];
    choose(next);
    requestAnimationFrame(() => document.querySelector(`[role="radiogroup"][aria-label="${label}"] [data-value="${next}"]`)?.focus());
  });
  return box;
}

function notes(title, texts) {
  return texts.length ? el("div", {class: "note"}, el("b", {}, title), el("ul", {}, texts.map((text) => el("li", {}, text)))) : null;
}
