// Everything that can be reached without a mouse by one key; `?` lists it. Can be switched off, as WCAG 2.1.4 asks.

import { $, el } from "./dom.js";
import { remember, remembered } from "./settings.js";

const LEAP = 10;

/** [keys as shown, what they do, when]. */
const HELP = [
  ["?", "this list"],
  ["g then f", "fleet"], ["g then a", "alarms"], ["g then c", "compare"], ["g then m", "model card of the forecaster"],
  ["u", "one level up: layer, run, fleet"],
  ["j  k", "next, previous row"], ["Enter", "open it"], ["/", "filter"],
  ["←  →", "previous, next step in the charts; with Shift ten"], ["a", "all steps again"], ["l", "logarithmic loss"],
  ["[  ]", "previous, next run or layer"],
  ["t", "theme: system, light, dark"], ["y", "copy the address of exactly this"], ["Esc", "close, or leave a field"],
];

const GO = { f: { view: "fleet" }, a: { view: "alarms" }, c: { view: "compare" }, m: { view: "forecaster" } };

export function keyboard(page, { nextTheme, copyAddress, neighbour }) {
  let waiting = null; // for the second key after g
  const on = () => remembered("keys") !== "off";
  $("keys-on").checked = on();
  $("keys-on").onchange = () => remember("keys", $("keys-on").checked ? null : "off");
  $("help-list").replaceChildren(...HELP.flatMap(([keys, text]) => [el("dt", {}, ...keyNodes(keys)), el("dd", {}, text)]));
  $("help-open").onclick = () => $("help").showModal();
  $("help-close").onclick = () => $("help").close();

  const acts = {
    "?": () => $("help").showModal(),
    u: () => page.view?.up && page.go(page.view.up),
    j: () => walkList(1),
    k: () => walkList(-1),
    "/": () => page.view?.filter?.().focus(),
    ArrowLeft: (event) => page.view?.walk?.(event.shiftKey ? -LEAP : -1),
    ArrowRight: (event) => page.view?.walk?.(event.shiftKey ? LEAP : 1),
    a: () => page.view?.allSteps?.(),
    l: () => page.view?.toggleLog?.(),
    "[": () => (page.view?.previous ? page.view.previous() : neighbour(-1)),
    "]": () => (page.view?.next ? page.view.next() : neighbour(1)),
    t: nextTheme,
    y: copyAddress,
  };

  function walkList(by) {
    const links = page.view?.list() ?? [];
    if (!links.length) return;
    const at = links.indexOf(document.activeElement);
    const next = links[Math.min(links.length - 1, Math.max(0, at < 0 ? (by > 0 ? 0 : links.length - 1) : at + by))];
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  }

  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && writes(event.target)) event.target.blur();
    if (!on() || event.ctrlKey || event.metaKey || event.altKey || writes(event.target) || $("help").open) return;
    const first = waiting;
    clearTimeout(waiting?.timer);
    waiting = null;
    if (first && GO[event.key]) page.go(GO[event.key]);
    else if (event.key === "g") waiting = { timer: setTimeout(() => { waiting = null; }, 1500) };
    else if (acts[event.key]) acts[event.key](event);
    else return;
    event.preventDefault();
  });
}

/** Whether keys mean text, or a choice, there. */
const writes = (node) => node.matches?.("input:not([type=checkbox]), textarea, select") ?? false;

const keyNodes = (keys) => keys.split(/\s+/).flatMap((key) => (key === "then" ? [" then "] : [el("kbd", {}, key), " "]));
