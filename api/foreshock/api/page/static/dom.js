// Builds the page's elements. Names of runs and layers reach the document as text only, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text nodes. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (key === "class") node.className = value;
    else if (key.includes("-") || key === "role") node.setAttribute(key, value);
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

/** Fills the page's main part from a template of index.html. */
export function mount(name) {
  $("main").replaceChildren($(`view-${name}`).content.cloneNode(true));
}

/** Options of a select: texts, or [value, text]; calls back with the value that a reader chose. */
export function choices(id, values, chosen, changed) {
  const options = values.map((each) => (Array.isArray(each) ? each : [each, each.replaceAll("_", " ")]));
  $(id).replaceChildren(...options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
  $(id).onchange = () => changed($(id).value);
}

/** Writes rows anew, but keeps those that are there already, so that focus and selection stay where they are. */
export function keyed(parent, items, make, fill) {
  const known = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  const nodes = items.map((item) => {
    const node = known.get(item.key) ?? make(item);
    node.dataset.key = item.key;
    fill(node, item);
    return node;
  });
  if (nodes.length !== parent.children.length || nodes.some((node, i) => parent.children[i] !== node)) {
    const focused = document.activeElement;
    parent.replaceChildren(...nodes);
    if (parent.contains(focused)) focused.focus();
  }
}

/** A click that means this page; with a modifier key it means another tab, which the browser opens itself. */
export function onPlainClick(link, act) {
  link.onclick = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    act();
  };
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
