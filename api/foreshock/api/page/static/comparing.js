// Two runs, or two attempts of one, on one axis of steps: where they part, and by how much.

import { $, choices, contentOr, el, onPlainClick } from "./dom.js";
import { drawable } from "./api.js";
import { listen, paint } from "./charts.js";
import { differenceFigure, heatHeight, isLog, linesFigure, withoutGaps } from "./figures.js";
import { side, sideText } from "./routes.js";
import { steps as stepsOf } from "./steps.js";
import { grouped, short, words } from "./text.js";
import * as wire from "./wire.js";

const ROWS = 60;

export function open(page, route) {
  const given = route.params;
  const sides = { a: null, b: null };
  const chosen = { scalar: given.scalar ?? "grad_norm", statistic: wire.STATISTICS.includes(given.statistic) ? given.statistic : "kurtosis", role: given.role ?? "input", layer: given.layer ?? null };
  let common = null; // steps that both have
  let shown = {};
  let told = "";
  const steps = stepsOf(page, route, { changed: () => page.jobs.now(curves, map, verdict), moved: () => draw() });
  const range = (which) => {
    const { from, to } = steps.range();
    return { from: from ?? common?.first_step, to: to ?? common?.last_step, attempt: sides[which]?.attempt ?? null };
  };

  /** A run from the address, once the list knows it, with what it has recorded. */
  async function resolve(name) {
    const wanted = side(page.route.params[name]);
    const run = wanted && page.find(wanted);
    const known = sides[name];
    if (!run) return null;
    if (known?.run.id === run.id && known.attempt === wanted.attempt && known.of === run.attempts) return { ...known, run };
    return { run, attempt: wanted.attempt, of: run.attempts, detail: await wire.detail(run) };
  }

  function selects() {
    for (const name of ["a", "b"]) {
      const found = sides[name];
      const runs = page.runs.map((run) => [sideText(run), run.project === "default" ? run.name : `${run.project} / ${run.name}`]);
      choices(`side-${name}`, [["", "choose a run"], ...runs], found ? sideText(found.run) : "", (value) => choose({ [name]: value || null }));
      const attempts = found?.detail.history ?? [];
      $(`attempt-${name}`).hidden = attempts.length < 2;
      choices(`attempt-${name}`, [["", "newest at each step"], ...attempts.map((n) => [String(n), `attempt ${n}`])], String(found?.attempt ?? ""),
        (value) => choose({ [name]: sideText(found.run, value ? Number(value) : null) }));
    }
  }

  function choose(changes) {
    page.replaceParams(changes);
    common = null;
    told = "";
    page.jobs.now();
  }

  $("swap").onclick = () => choose({ a: page.route.params.b ?? null, b: page.route.params.a ?? null });

  function controls() {
    const both = (list) => sides.a.detail[list].filter((each) => sides.b.detail[list].includes(each));
    const [scalars, roles, layers] = [both("scalars").filter((name) => name !== "loss"), both("roles"), both("layers")];
    if (!scalars.includes(chosen.scalar)) [chosen.scalar] = scalars;
    if (!roles.includes(chosen.role)) chosen.role = roles[0] ?? "input";
    if (!layers.includes(chosen.layer)) chosen.layer = layers[0] ?? null;
    const set = (name, job) => (value) => {
      chosen[name] = value;
      page.replaceParams({ [name]: value });
      told = "";
      page.jobs.now(...job());
    };
    choices("compare-scalar", scalars, chosen.scalar ?? "", set("scalar", () => [curves]));
    choices("compare-statistic", wire.STATISTICS, chosen.statistic, set("statistic", () => [curves, map, verdict]));
    choices("compare-role", roles, chosen.role, set("role", () => [curves, map, verdict]));
    choices("compare-layer", layers.map((name) => [name, name]), chosen.layer ?? "", set("layer", () => [curves]));
  }

  const ready = () => Boolean(sides.a && sides.b);

  const begin = page.jobs.add(2000, async (current) => {
    const [a, b] = [await resolve("a"), await resolve("b")];
    if (!current()) return;
    const key = JSON.stringify([a?.run.id, a?.attempt, a?.of, b?.run.id, b?.attempt, b?.of, page.runs.length]);
    const fresh = begin.key !== key;
    begin.key = key;
    Object.assign(sides, { a, b });
    $("compare-body").hidden = !ready();
    $("compare-hint").hidden = ready();
    $("compare-hint").textContent = hint(a, b);
    if (!fresh) return;
    selects();
    if (!ready()) return;
    controls();
    page.jobs.now(verdict);
  });

  function hint(a, b) {
    const missing = ["a", "b"].filter((name) => page.route.params[name] && !{ a, b }[name]).map((name) => page.route.params[name]);
    if (missing.length) return `No run called ${missing.join(" or ")}. It was deleted, or it has not reported yet.`;
    return page.runs.length ? "Choose two runs, or two attempts of one run." : "No runs yet.";
  }

  const verdict = page.jobs.add(10000, async (current) => {
    if (!ready()) return;
    const { from, to } = steps.range();
    const query = {
      other_attempt: sides.b.attempt, attempt: sides.a.attempt, role: chosen.role, statistic: chosen.statistic, first_step: from, last_step: to,
    };
    let found;
    try {
      found = await wire.compare(sides.a.run, sides.b.run, query);
    } catch (error) {
      if (error.status !== 422) throw error;
      if (current()) {
        $("compare-body").hidden = true;
        $("compare-hint").hidden = false;
        $("compare-hint").textContent = `They cannot be compared: ${error.message}.`;
      }
      return;
    }
    if (!current()) return;
    if (from === null) common = found;
    tell(found);
    page.jobs.now(curves, map);
  });

  function tell(found) {
    const signature = JSON.stringify(found);
    if (told === signature) return;
    told = signature;
    const first = found.partings[0];
    const layered = found.partings.find((p) => p.layer);
    if (layered && !page.route.params.layer) {
      chosen.layer = layered.layer;
      $("compare-layer").value = layered.layer;
    }
    const what = (p) => (p.layer ? `${words(p.statistic)} of ${p.layer}` : words(p.statistic));
    $("verdict").textContent = first
      ? `They part at step ${grouped(first.step)}: ${what(first)} is ${short(first.a)} in A and ${short(first.b)} in B.`
      : `They do not part beyond their noise, from step ${grouped(found.first_step)} to ${grouped(found.last_step)}.`;
    const judged = found.judged_layers < found.layers ? `the ${found.judged_layers} of ${grouped(found.layers)} layers that moved most` : `${found.layers} layers`;
    const width = found.width > 1 ? ` Scalars in blocks of ${found.width} steps.` : "";
    $("verdict-note").textContent = `Judged: all scalars, and ${words(chosen.statistic)} of ${words(chosen.role)} in ${judged}.${width} foreshock compare judges every tensor.`;
    contentOr("partings", found.partings.length ? null : "Nothing parts.");
    $("partings").tBodies[0].replaceChildren(...found.partings.slice(0, 30).map((p) => {
      const link = el("a", { href: "#" }, what(p));
      onPlainClick(link, () => look(p));
      const units = p.kind === "nonfinite" ? "not finite on one side" : `${short(p.noise_units)} × noise`;
      return el("tr", {}, el("td", { class: "number" }, grouped(p.step)), el("th", { scope: "row" }, link), el("td", { class: "number" }, short(p.a)),
        el("td", { class: "number" }, short(p.b)), el("td", {}, units));
    }));
    $("partings-more").textContent = found.partings.length > 30 ? `${found.partings.length - 30} more` : "";
  }

  /** Show one parting in the charts. */
  function look(parting) {
    if (parting.layer) {
      chosen.layer = parting.layer;
      $("compare-layer").value = parting.layer;
    } else if (parting.statistic !== "loss") {
      chosen.scalar = parting.statistic;
      $("compare-scalar").value = parting.statistic;
    }
    page.replaceParams({ layer: chosen.layer, scalar: chosen.scalar });
    steps.pick(parting.step);
    page.jobs.now(curves);
  }

  const curves = page.jobs.add(3000, async (current) => {
    if (!ready() || !common) return;
    const which = { layer: chosen.layer, role: chosen.role, statistic: chosen.statistic };
    const of = (name) => [
      wire.scalar(sides[name].run, "loss", range(name)),
      chosen.scalar ? wire.scalar(sides[name].run, chosen.scalar, range(name)) : { step: [] },
      chosen.layer ? wire.tensor(sides[name].run, which, range(name)) : { step: [] },
    ];
    const [a, b] = await Promise.all(["a", "b"].map((name) => Promise.all(of(name))));
    if (!current()) return;
    shown = { ...shown, a, b };
    await draw();
    for (const id of CURVES) if ($(id).data) listen($(id), { zoomed: steps.zoom, picked: steps.pick });
  });

  const CURVES = ["compare-loss", "compare-other", "compare-tensor"];

  async function draw() {
    if (shown.heat) drawMap();
    if (!shown.a) return;
    const names = { a: label("a"), b: label("b") };
    const logs = [false, /norm|ratio|rate/.test(chosen.scalar ?? ""), isLog(chosen.statistic)];
    await Promise.all(CURVES.map((id, i) => {
      const lines = [["a", 0], ["b", 1]].map(([name, place]) => ({ name: names[name], series: shown[name][i], place })).filter((line) => line.series.step.length);
      contentOr(id, lines.length ? null : "Neither has recorded it here.");
      return lines.length ? paint($(id), () => linesFigure({ lines, log: logs[i], step: steps.step, range: axis() })) : null;
    }));
  }

  const axis = () => {
    const { from, to } = range("a");
    return from === undefined ? {} : { from, to: Math.max(to, from + 1) };
  };

  const label = (name) => `${name.toUpperCase()}: ${sides[name].run.name}${sides[name].attempt ? ` @${sides[name].attempt}` : ""}`;

  const map = page.jobs.add(5000, async (current) => {
    if (!ready() || !common) return;
    const query = { statistic: chosen.statistic, role: chosen.role, rows: ROWS, points: 160 };
    const [a, b] = await Promise.all(["a", "b"].map((name) => wire.heat(sides[name].run, query, range(name))));
    if (!current()) return;
    const heat = withoutGaps(difference(a, b, isLog(chosen.statistic)));
    shown.heat = heat.values.some((row) => row.some((value) => value !== null)) ? heat : null;
    contentOr("compare-map", shown.heat ? null : "No layer has this statistic in both at the same steps.");
    if (!shown.heat) return;
    $("compare-map").style.height = `${heatHeight(heat.layers.length)}px`;
    await drawMap();
    listen($("compare-map"), {
      zoomed: steps.zoom,
      picked: (step, point) => {
        chosen.layer = shown.heat.layers[Number(point.y)] ?? chosen.layer;
        $("compare-layer").value = chosen.layer;
        page.replaceParams({ layer: chosen.layer });
        steps.pick(step);
        page.jobs.now(curves);
      },
    });
  });

  const drawMap = () => paint($("compare-map"), () => differenceFigure({ heat: shown.heat, statistic: chosen.statistic, step: steps.step, range: axis() }));

  return {
    title: "Compare",
    runsChanged: () => page.jobs.mark(),
    list: () => [...$("partings").querySelectorAll("th a")],
    walk: (by) => steps.walk(by, shown.a?.[0].step ?? []),
    allSteps: () => steps.zoom(null),
    close() {},
  };
}

/** B against A, for the rows and stretches that both have; log2 of the quotient, or the difference. */
export function difference(a, b, log) {
  const rows = new Map(b.layers.map((layer, i) => [layer, i]));
  const columns = new Map(b.steps.map((step, i) => [step, i]));
  const both = a.layers.map((layer, i) => i).filter((i) => rows.has(a.layers[i]));
  const width = a.steps.length > 1 ? a.steps[1] - a.steps[0] : 1;
  // Two runs that do not begin at the same step have stretches that begin a little apart.
  const column = (step) => columns.get(step) ?? b.steps.findIndex((other) => Math.abs(other - step) < width / 2 + 0.5);
  const places = a.steps.map(column);
  const values = both.map((i) => a.values[i].map((value, j) => {
    const left = drawable(value);
    const right = places[j] < 0 ? null : drawable(b.values[rows.get(a.layers[i])][places[j]] ?? null);
    if (left === null || right === null) return null;
    if (!log) return right - left;
    return left > 0 && right > 0 ? Math.log2(right / left) : null;
  }));
  return { layers: both.map((i) => a.layers[i]), counts: both.map((i) => a.counts[i]), steps: a.steps, values };
}
