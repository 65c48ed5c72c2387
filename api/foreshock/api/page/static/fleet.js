// The first view: every run, what it is doing, how likely it is to diverge, and what fires.

import { $, el, keyed, pill } from "./dom.js";
import { queue } from "./refresh.js";
import { sideText } from "./routes.js";
import { canvas, sparkline } from "./sparkline.js";
import { grouped, percent, short } from "./text.js";
import * as wire from "./wire.js";

const LINES_EVERY = 10000; // ms at least between two looks at the lines of one run
const LAG = 4000; // ms until lines that were not whole are looked at again
const LINE_POINTS = 60;
const TRIES = 6; // looks at lines that lag behind the run: its newest steps are not scored yet, or never will be
const NEWEST = 1000; // steps that the line of the risk shows
const RANK = { firing: 0, pending: 1, resolved: 2, ok: 3 };

const ORDERS = {
  alarm: ["what needs you first", (a, b) => (RANK[a.state] ?? 4) - (RANK[b.state] ?? 4) || b.worst - a.worst],
  risk: ["highest risk", (a, b) => b.worst - a.worst],
  name: ["name", (a, b) => a.name.localeCompare(b.name)],
  created: ["youngest", (a, b) => b.created.localeCompare(a.created)],
};

const SHOWN = {
  all: ["all", () => true],
  firing: ["firing", (run) => run.state === "firing"],
  live: ["live", (run) => run.status === "live"],
  stale: ["silent", (run) => run.status === "stale"],
  finished: ["finished", (run) => run.status === "finished"],
};

export function open(page, route) {
  const chosen = { order: ORDERS[route.params.order] ? route.params.order : "alarm", show: SHOWN[route.params.show] ? route.params.show : "all" };
  const lines = new Map(); // by run: when its lines were drawn, of which step, how often, and whether the risk was that far
  const soon = queue(3);
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) target.inView = isIntersecting;
    drawLines();
  }, { rootMargin: "200px" });
  const picked = new Set();
  let fired = new Map();

  const remember = (changes) => page.replaceParams(changes);
  setUp("order", ORDERS);
  setUp("show", SHOWN);
  $("filter").value = route.params.q ?? "";
  $("filter").oninput = () => {
    remember({ q: $("filter").value || null });
    fill();
  };
  $("compare-picked").onclick = () => {
    const [a, b] = [...picked].map((id) => page.runs.find((run) => run.id === id));
    if (a && b) page.go({ view: "compare", params: { a: sideText(a), b: sideText(b) } });
  };

  function setUp(id, table) {
    $(id).replaceChildren(...Object.entries(table).map(([value, [text]]) => el("option", { value, selected: value === chosen[id] }, text)));
    $(id).onchange = () => {
      chosen[id] = $(id).value;
      remember({ [id]: $(id).value });
      fill();
    };
  }

  function rows() {
    const text = $("filter").value.trim().toLowerCase();
    const wanted = (run) => SHOWN[chosen.show][1](run) && (!text || `${run.project}/${run.name}`.toLowerCase().includes(text));
    return page.runs.filter(wanted).sort((a, b) => ORDERS[chosen.order][1](a, b) || a.name.localeCompare(b.name));
  }

  function newRow() {
    const row = el("tr", {}, ...["pick", "state", "name", "risk", "trend", "loss", "step", "doing", "fires"].map((name) => el(name === "name" ? "th" : "td", { class: name })));
    row.children[2].scope = "row";
    row.spark = { risk: canvas(), loss: canvas() };
    row.children[4].append(row.spark.risk);
    seen.observe(row);
    return row;
  }

  function fillRow(row, run) {
    row.run = run;
    const [pick, state, name, risk, , loss, step, doing, fires] = row.children;
    if (!pick.firstChild) {
      const box = el("input", { type: "checkbox" });
      box.onchange = () => pickRun(run.id, box.checked);
      pick.append(box);
      name.append(el("a", {}));
      loss.append(row.spark.loss, el("span", {}));
    }
    pick.firstChild.setAttribute("aria-label", `compare ${run.name}`);
    pick.firstChild.checked = picked.has(run.id);
    state.replaceChildren(pill(run.state));
    const link = name.firstChild;
    link.href = run.href;
    link.textContent = run.name;
    name.title = run.project;
    if (run.project !== "default" && name.children.length < 2) name.append(el("span", { class: "project" }, run.project));
    risk.replaceChildren(...(run.risks.length ? run.risks.map(([h, p]) => meter(h, p)) : [el("span", { class: "quiet" }, "no forecast yet")]));
    loss.lastChild.textContent = run.loss === null || run.loss === undefined ? "" : short(run.loss);
    step.textContent = grouped(run.lastStep);
    doing.textContent = run.activity;
    doing.className = `doing ${run.status}`;
    const alerts = fired.get(run.id) ?? [];
    fires.replaceChildren(...alerts.slice(0, 2).map((alert) => {
      const link = el("a", { href: alert.href }, alert.summary);
      return el("p", {}, link);
    }), ...(alerts.length > 2 ? [el("p", { class: "quiet" }, `and ${alerts.length - 2} more`)] : []));
  }

  function pickRun(id, yes) {
    if (yes) picked.add(id);
    else picked.delete(id);
    while (picked.size > 2) picked.delete([...picked][0]);
    fill();
  }

  function fill() {
    const list = rows();
    keyed($("runs"), list, newRow, fillRow);
    $("runs-table").hidden = !list.length;
    const text = page.runs.length ? "No run is like that. Clear the filter to see all." : null;
    $("runs-none").hidden = Boolean(list.length) || !text;
    $("runs-none").textContent = text ?? "";
    $("runs-empty").hidden = page.runs.length > 0;
    $("compare-picked").disabled = picked.size !== 2;
    const counts = ["firing", "live", "stale"].map((name) => [SHOWN[name][0], page.runs.filter(SHOWN[name][1]).length]);
    $("fleet-facts").textContent = [`${page.runs.length} ${page.runs.length === 1 ? "run" : "runs"}`, ...counts.filter(([, n]) => n).map(([word, n]) => `${n} ${word}`)].join("  ·  ");
    drawLines();
  }

  function drawLines() {
    const now = performance.now();
    for (const row of $("runs").children) {
      const { run } = row;
      const last = lines.get(run.id);
      const same = last?.step === run.lastStep;
      const settled = same && (last.whole || last.tries >= TRIES);
      if (!row.inView || run.lastStep === null || settled || now - (last?.at ?? -Infinity) < (same ? LAG : LINES_EVERY)) continue;
      lines.set(run.id, { at: now, step: run.lastStep, tries: same ? last.tries + 1 : 1, whole: false });
      soon(() => drawRow(row, run)).catch(page.failed);
    }
  }

  async function drawRow(row, run) {
    if (!row.isConnected) return;
    const from = Math.max(0, run.lastStep - NEWEST + 1);
    const [loss, risk] = await Promise.all([wire.scalar(run, "loss", {}, LINE_POINTS), wire.history(run, { from }, LINE_POINTS)]);
    sparkline(row.spark.loss, { ...loss, label: `loss of ${run.name} over all its steps, now ${short(run.loss)}`, kind: "loss" });
    lines.get(run.id).whole = risk.step.at(-1) === run.lastStep;
    const horizon = ["100", ...Object.keys(risk.probability)].find((h) => risk.probability[h]?.some((p) => p !== null));
    const value = horizon ? risk.probability[horizon] : [];
    sparkline(row.spark.risk, { step: risk.step, value, range: [0, 1], kind: "risk",
      label: `risk of ${run.name} within ${horizon} steps, over its newest ${NEWEST} steps, now ${percent(value.at(-1))}` });
  }

  const alerts = page.jobs.add(3000, async (current) => {
    const rows = await wire.alerts(null, "firing");
    if (!current()) return;
    fired = new Map();
    for (const row of rows) fired.set(row.run_id, [...(fired.get(row.run_id) ?? []), row]);
    fill();
  });

  return {
    title: "Fleet",
    runsChanged() {
      page.jobs.mark(alerts);
      fill();
    },
    list: () => [...$("runs").querySelectorAll("th a")],
    filter: () => $("filter"),
    close: () => seen.disconnect(),
  };
}

/** A risk as a number and as the length of a bar. */
function meter(horizon, probability) {
  const fill = el("span", { class: "fill" });
  fill.style.width = `${Math.max(1, 100 * probability)}%`;
  return el("span", { class: "meter" },
    el("span", { class: "label" }, `${grouped(horizon)}:`), el("span", { class: "value" }, percent(probability)),
    el("span", { class: "track", "aria-hidden": "true" }, fill));
}
