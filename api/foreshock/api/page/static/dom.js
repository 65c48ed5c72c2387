// Builds the page's elements. Names of runs and layers reach the document as text only, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text nodes. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") node.className = value;
    else if (key.includes("-")) node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function show(id, visible) {
  $(id).hidden = !visible;
}

/** Shows either the content or one line that says why there is none. */
export function contentOr(id, reason) {
  show(id, !reason);
  show(`${id}-empty`, Boolean(reason));
  $(`${id}-empty`).textContent = reason ?? "";
}

export const STATES = {
  ok: ["●", "ok"],
  pending: ["◐", "pending"],
  firing: ["▲", "firing"],
  resolved: ["✓", "resolved"],
};

export function pill(state, big = false) {
  const [glyph, word] = STATES[state] ?? ["○", state || "no forecast"];
  const known = state in STATES ? state : "unknown";
  return el("span", { class: `pill ${known}${big ? " big" : ""}` }, el("span", { "aria-hidden": "true" }, glyph), word);
}

export function percent(value) {
  if (value === null || value === undefined) return "–";
  if (value > 0 && value < 0.001) return "<0.1 %";
  return `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
}

export function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  return String(Number(value.toPrecision(4)));
}

export function ago(time) {
  const seconds = (Date.now() - Date.parse(time)) / 1000;
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 5) return "just now";
  const [size, word] = seconds < 90 ? [1, "s"] : seconds < 5400 ? [60, "min"] : seconds < 129600 ? [3600, "h"] : [86400, "d"];
  return `${Math.round(seconds / size)} ${word} ago`;
}
