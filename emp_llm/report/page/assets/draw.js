// Shared by all sections: elements, numbers for people, drawings that fit their place.
// Tensor names may be hostile: they are only ever put into text nodes.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

const percent = (share, digits = 2) => `${(100 * share).toFixed(digits)}%`;
const whole = (number) => number.toLocaleString("en");
const least = (values) => values.reduce((a, b) => Math.min(a, b));
const most = (values) => values.reduce((a, b) => Math.max(a, b));

function scaled(number, units) {
  let unit = 0;
  while (number >= 999.5 && unit < units.length - 1) [number, unit] = [number / 1000, unit + 1];
  const digits = unit === 0 || number >= 99.95 ? number.toFixed(0) : String(Number(number.toPrecision(3)));
  return `${digits} ${units[unit]}`.trim();
}

const size = (bytes) => scaled(bytes, ["B", "kB", "MB", "GB", "TB"]);
const count = (number) => scaled(number, ["", "k", "M", "G", "T"]);

// Calls back with the width of a place, now and whenever it changes.
function fitted(place, callback) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(place.clientWidth);
    if (now && now !== width) callback((width = now));
  }).observe(place);
}

// A row of buttons, one of them chosen.
function chips(label, names, choose) {
  const row = el("div", { class: "chips", role: "group", "aria-label": label });
  const press = (chosen) => {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === chosen)));
    choose(chosen);
  };
  const buttons = names.map((name, i) => el("button", { type: "button", click: () => press(i) }, name));
  row.append(...buttons);
  row.press = press;
  return row;
}

// The note beside the pointer or the focused cell: a heading, then pairs of name and value.
function showTip(heading, pairs, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(el("b", {}, heading), ...pairs.map(([word, figure]) => el("span", {}, el("i", {}, word), figure)));
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const above = y - tip.offsetHeight - 12;
  tip.style.left = `${Math.max(8, Math.min(x + window.scrollX - tip.offsetWidth / 2, room))}px`;
  tip.style.top = `${(above < 4 ? y + 22 : above) + window.scrollY}px`;
}

const hideTip = () => { byId("tip").hidden = true; };

// The ramp's colour at a share from 0, nearly the background's, to 1, nearly the text's.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const rampAt = (share) => {
  const stops = content.ramp, at = (dark.matches ? 1 - share : share) * (stops.length - 1);
  const from = Math.min(Math.floor(at), stops.length - 2), part = at - from;
  const mix = [1, 3, 5].map((i) => {
    const [a, b] = [stops[from], stops[from + 1]].map((stop) => parseInt(stop.slice(i, i + 2), 16));
    return Math.round(a + (b - a) * part);
  });
  const [red, green, blue] = mix.map((part) => (part / 255) ** 2.2);
  return { color: `rgb(${mix})`, isDark: 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.185 };
};
