// What other number formats would make of the same tensors, as measured over the newest steps.

import { $, contentOr, el } from "./dom.js";
import { drawable } from "./api.js";
import { href } from "./routes.js";
import { grouped, short, words } from "./text.js";
import * as wire from "./wire.js";

const COLUMNS = ["sqnr_db", "underflow_ratio", "overflow_ratio", "headroom_log2"];
const NEWEST = 1000; // steps that are looked at: tensors may come at every hundredth
const MOST = 9; // layers shown, the worst first

/** For a run: the worst layers, one column per format, for one statistic. */
export function whatIfCard(page, run, role) {
  let statistic = "sqnr_db";
  $("whatif-statistic").replaceChildren(...COLUMNS.map((value) => el("option", { value }, words(value))));
  $("whatif-statistic").onchange = () => {
    statistic = $("whatif-statistic").value;
    page.jobs.now(job);
  };
  const job = page.jobs.add(10000, async (current) => {
    if (!page.detail || page.run.lastStep === null) return;
    const from = Math.max(0, page.run.lastStep - NEWEST + 1);
    const given = { statistic, role: role(), points: 1 };
    const formats = page.detail.formats;
    const maps = await Promise.all(formats.map((format) => wire.heat(run, { ...given, format }, { from })));
    if (!current()) return;
    const table = collect(formats, maps);
    const measured = formats.filter((format) => table.some((row) => row.values[format] !== null));
    contentOr("whatif", table.length ? null : `No ${words(statistic)} of ${words(given.role)} recorded over the newest ${grouped(NEWEST)} steps.`);
    $("whatif-note").textContent = measured.length < 2
      ? "Only the formats that the run uses are measured: watch(what_if=[...]) adds others."
      : `Worst of the newest ${grouped(NEWEST)} steps, tensors: ${words(given.role)}; the ${Math.min(MOST, table.length)} worst of ${grouped(table.length)} layers.`;
    write(run, table.slice(0, MOST), measured, given);
  });
  return job;
}

/** Rows by layer, worst first in whatever format is worst for it. */
function collect(formats, maps) {
  const rows = new Map();
  maps.forEach((map, i) => map.layers.forEach((layer, j) => {
    const row = rows.get(layer) ?? { layer, values: Object.fromEntries(formats.map((format) => [format, null])) };
    row.values[formats[i]] = drawable(map.values[j].at(-1) ?? null);
    rows.set(layer, row);
  }));
  const sign = maps[0]?.worst === "min" ? 1 : -1;
  const worst = (row) => Math.min(...Object.values(row.values).filter((v) => v !== null).map((v) => sign * v));
  return [...rows.values()].filter((row) => Number.isFinite(worst(row))).sort((a, b) => worst(a) - worst(b));
}

function write(run, rows, formats, { role, statistic }) {
  const table = $("whatif");
  table.tHead.replaceChildren(el("tr", {}, el("th", { scope: "col" }, "Layer"), ...formats.map((format) => el("th", { scope: "col", class: "number" }, format))));
  table.tBodies[0].replaceChildren(...rows.map(({ layer, values }) => el("tr", {},
    el("th", { scope: "row" }, el("a", { href: href({ view: "layer", project: run.project, run: run.name, layer, params: { role, statistic } }) }, layer)),
    ...formats.map((format) => el("td", { class: "number" }, short(values[format]))))));
}

/** For a layer: one row per format, one column per statistic of the cast. */
export async function layerFormats(run, layer, role, detail) {
  const from = Math.max(0, (run.lastStep ?? 0) - NEWEST + 1);
  const maps = await Promise.all(COLUMNS.flatMap((statistic) => detail.formats.map((format) =>
    wire.heat(run, { statistic, role, format, start: layer, span: 1, points: 1 }, { from }))));
  const cell = (i) => drawable(maps[i].layers[0] === layer ? maps[i].values[0].at(-1) ?? null : null);
  return detail.formats.map((format, f) => ({ format, values: COLUMNS.map((_, s) => cell(s * detail.formats.length + f)) }))
    .filter(({ values }) => values.some((value) => value !== null));
}

export const FORMAT_COLUMNS = COLUMNS;
