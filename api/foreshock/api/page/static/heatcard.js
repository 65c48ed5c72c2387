// Layers by steps as a card: which statistic, which tensor, which layers; the rows that are worst now; the way into a layer.

import { $, choices, contentOr, el } from "./dom.js";
import { drawable } from "./api.js";
import { listen, paint } from "./charts.js";
import { heatFigure, heatHeight, rowName, withoutGaps } from "./figures.js";
import { href, whole } from "./routes.js";
import { grouped, short, words } from "./text.js";
import * as wire from "./wire.js";

const WORST = 6; // rows named beside the map
const MOST_ROWS = 96; // as many as 760 pixels show

export function heatCard(page, run, route, steps, alarms) {
  const given = route.params;
  const chosen = {
    statistic: wire.STATISTICS.includes(given.statistic) ? given.statistic : "kurtosis", role: given.role ?? null, format: given.format ?? "",
    match: given.match ?? "", start: given.start ?? "", span: whole(given.span),
  };
  let seen = null;
  const set = (changes) => {
    Object.assign(chosen, changes);
    page.replaceParams(changes);
    page.jobs.now(job);
  };
  choices("statistic", wire.STATISTICS, chosen.statistic, (statistic) => set({ statistic }));
  $("match").value = chosen.match;
  let typing = null;
  $("match").oninput = () => {
    clearTimeout(typing);
    typing = setTimeout(() => set({ match: $("match").value.trim(), start: "", span: null }), 250);
  };

  function roles(detail) {
    if (!detail.roles.includes(chosen.role)) chosen.role = detail.roles[0] ?? "input";
    choices("role", detail.roles.length ? detail.roles : ["input"], chosen.role, (role) => set({ role }));
    choices("format", [["", "as used"], ...detail.formats], chosen.format, (format) => set({ format }));
    $("layer-names").replaceChildren(...detail.layers.map((value) => el("option", { value })));
    $("layer-count").textContent = `${grouped(detail.layers.length)} layers`;
  }

  const open = (layer, step = null) => page.go({
    view: "layer", project: run.project, run: run.name, layer,
    params: { step: step ?? steps.step, statistic: chosen.statistic, role: chosen.role, ...steps.range() },
  });

  function clicked(step, point) {
    const row = seen && Number(point.y);
    if (row === null || !(row in seen.layers)) return;
    if (seen.counts[row] > 1) set({ start: seen.layers[row], span: seen.counts[row], match: chosen.match });
    else open(seen.layers[row], seen.steps[point.pointIndex?.[1]] ?? step);
  }

  function stretch() {
    const part = Boolean(chosen.start);
    $("heat-part").hidden = !part;
    if (!part) return;
    const button = el("button", { type: "button" }, `${chosen.span ?? ""} layers from ${chosen.start} `, el("span", { "aria-hidden": "true" }, "✕"));
    button.setAttribute("aria-label", `${button.textContent}: show all layers`);
    button.onclick = () => set({ start: "", span: null });
    $("heat-part").replaceChildren(button);
  }

  function worst(heat) {
    const sign = heat.worst === "min" ? 1 : -1;
    const last = heat.values.map((row, i) => [i, [...row].map(drawable).reverse().find((value) => value !== null)]);
    const found = last.filter(([, value]) => value !== undefined && value !== null).sort((a, b) => sign * (a[1] - b[1])).slice(0, WORST);
    $("heat-worst").replaceChildren(...found.map(([i, value]) => el("li", {},
      el("a", { href: href({ view: "layer", project: run.project, run: run.name, layer: heat.layers[i], params: { role: chosen.role, statistic: chosen.statistic } }) }, rowName(heat, i)),
      el("span", { class: "value" }, short(value)))));
    $("heat-worst-title").textContent = `${heat.worst === "min" ? "Lowest" : "Highest"} ${words(chosen.statistic)} now`;
    $("heat-worst-title").hidden = !found.length;
  }

  const job = page.jobs.add(3000, async (current) => {
    if (!page.detail) return;
    if ($("role").dataset.of !== page.detail.key) {
      roles(page.detail);
      $("role").dataset.of = page.detail.key;
    }
    stretch();
    const { clientWidth } = $("heat");
    const points = Math.min(400, Math.max(80, Math.round((clientWidth || 600) / 3)));
    const { start, span, match, statistic, role, format } = chosen;
    const heat = withoutGaps(await wire.heat(run, { statistic, role, format, match, start, span, rows: MOST_ROWS, points }, steps.range()));
    if (!current()) return;
    const some = heat.values.some((row) => row.some((value) => value !== null));
    contentOr("heat", some ? null : match && !heat.layers.length ? `No layer is called like “${match}”.` : `No ${words(statistic)} of ${words(role)} recorded${format ? ` in ${format}` : ""} here.`);
    seen = some ? heat : null;
    const grouping = heat.counts.find((count) => count > 1);
    $("heat-note").textContent = grouping ? `A row stands for ${grouping} neighbouring layers and shows the worst of them; click it to see them one by one.` : "Click a row to see all of a layer.";
    $("heat-csv").href = wire.address(run, "/heatmap", { statistic, role, format, match, points, as: "csv" });
    worst(heat);
    if (!some) return;
    $("heat").style.height = `${heatHeight(heat.layers.length)}px`;
    await draw();
    listen($("heat"), { zoomed: steps.zoom, picked: clicked });
  });

  const draw = () => seen && paint($("heat"), () => heatFigure({ heat: seen, statistic: chosen.statistic, alarms: alarms(), step: steps.step, range: steps.range() }));

  $("layer-form").onsubmit = (event) => {
    event.preventDefault();
    const name = $("layer-name").value.trim();
    if (page.detail?.layers.includes(name)) open(name);
    else $("layer-name").setCustomValidity("No layer of this run has this name.");
    $("layer-name").reportValidity();
  };
  $("layer-name").oninput = () => $("layer-name").setCustomValidity("");

  return { job, draw, chosen };
}
