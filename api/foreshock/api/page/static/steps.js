// The steps that a reader looks at, shared by all charts of a view: a range, one step, an attempt. They stand in the address.

import { $, el } from "./dom.js";
import { whole } from "./routes.js";
import { grouped } from "./text.js";

/** Holds them; `changed` is called when the charts have to be fetched anew, `moved` when only the step has changed. */
export function steps(page, route, { changed, moved }) {
  const state = { from: null, to: null, attempt: null, step: null };
  const read = () => Object.keys(state).forEach((name) => {
    state[name] = whole(route.params[name]);
  });
  read();
  if (state.from === null || state.to === null || state.to <= state.from) Object.assign(state, { from: null, to: null });

  function show() {
    const chips = [];
    if (state.from !== null) chips.push(chip(`steps ${grouped(state.from)} to ${grouped(state.to)}`, "show all steps", () => zoom(null)));
    if (state.step !== null) chips.push(chip(`at step ${grouped(state.step)}`, "no single step", () => pick(null)));
    const hint = el("span", { class: "quiet" }, "Drag across a chart to zoom, click it to look at one step.");
    $("chosen-steps").replaceChildren(...chips, ...(chips.length ? [] : [hint]));
  }

  function chip(text, hint, act) {
    const button = el("button", { type: "button", title: hint, "aria-label": `${text}: ${hint}` }, text, el("span", { "aria-hidden": "true" }, "✕"));
    button.onclick = act;
    return button;
  }

  function zoom(range) {
    const next = range ?? { from: null, to: null };
    if (next.from === state.from && next.to === state.to) return;
    Object.assign(state, next);
    page.replaceParams({ from: state.from, to: state.to });
    show();
    changed();
  }

  function pick(step) {
    state.step = step;
    page.replaceParams({ step });
    show();
    moved();
  }

  function attempt(number) {
    state.attempt = number;
    page.replaceParams({ attempt: number });
    changed();
  }

  show();
  const range = () => ({ from: state.from, to: state.to, attempt: state.attempt });
  return {
    range, zoom, pick, attempt,
    get step() {
      return state.step;
    },
    get attemptNumber() {
      return state.attempt;
    },
    /** One stretch to the left or right, for the arrow keys; `known` are the steps that a chart shows. */
    walk(by, known) {
      if (!known.length) return;
      const at = state.step === null ? (by < 0 ? known.length : -1) : nearest(known, state.step);
      const next = known[Math.min(known.length - 1, Math.max(0, at + by))];
      pick(next);
    },
  };
}

/** The place of the last step that is not after `step`, or the first. */
export function nearest(known, step) {
  let [low, high] = [0, known.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (known[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
}
