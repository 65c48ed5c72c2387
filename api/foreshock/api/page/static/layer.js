// One layer: every statistic of its tensors over the steps, by role and number format.

import { $, choices, el, onPlainClick } from "./dom.js";
import { listen, paint } from "./charts.js";
import { LINES, isLog, linesFigure } from "./figures.js";
import { queue } from "./refresh.js";
import { href } from "./routes.js";
import { nearest, steps as stepsOf } from "./steps.js";
import { short, words } from "./text.js";
import { FORMAT_COLUMNS, layerFormats } from "./whatif.js";
import * as wire from "./wire.js";

const POINTS = 400; // a small chart is about as wide

/** In the order of a reader's questions; what each says, in a few words. */
const GROUPS = [
  ["Outliers", {
    kurtosis: "about zero, all elements together; Gaussian = 3", kurtosis_sequence_mean: "the same per sequence, averaged",
    channel_kurtosis: "of the channels' energies; 1 = all alike", top_channel_share: "energy of the largest channel", top_channel: "which channel that is",
  }],
  ["Lost in the cast", {
    sqnr_db: "signal to quantisation noise, dB", underflow_ratio: "nonzero before, zero after", subnormal_ratio: "below the smallest normal number",
    overflow_ratio: "beyond the largest number", zero_ratio: "zeros of the tensor", nonfinite_count: "NaN and infinities",
  }],
  ["Range and scale", {
    headroom_log2: "log2 of the room left; under 0 = saturating", amax: "largest magnitude", rms: "root mean square", min_nonzero: "smallest magnitude",
    scale_log2: "log2 of the smallest scale", scale_log2_max: "log2 of the largest scale", scale_log2_p01: "1 % of the blocks' scales", scale_log2_p50: "median of the blocks' scales",
    scale_log2_p99: "99 % of the blocks' scales", mu: "factor of automatic gradient scaling", amax_rank: "rank that holds the largest",
  }],
];

export function open(page, route) {
  const { run } = page;
  const { layer } = route;
  const cards = new Map(); // by statistic
  const soon = queue(4); // a browser has six connections, and the events hold one
  let roles = route.params.roles?.split(",") ?? null;
  let format = route.params.format ?? "";
  let formats = null;
  const steps = stepsOf(page, route, { changed: () => page.jobs.now(charts), moved: () => drawAll() });

  $("layer-title").textContent = layer;
  const seen = new IntersectionObserver((entries) => {
    let came = false;
    for (const { target, isIntersecting } of entries) {
      came ||= isIntersecting && !target.inView;
      target.inView = isIntersecting;
    }
    if (came) page.jobs.now(charts);
  }, { rootMargin: "150px" });
  build();

  function build() {
    $("statistics").replaceChildren(...GROUPS.map(([title, table]) => el("section", { class: "group" }, el("h2", {}, title),
      el("div", { class: "grid" }, ...Object.entries(table).map(([statistic, meaning]) => card(statistic, meaning))))));
  }

  function card(statistic, meaning) {
    const chart = el("div", { class: "chart small", role: "img", "aria-label": `${words(statistic)} of ${layer} by step` });
    const value = el("p", { class: "readout" });
    const node = el("section", { class: `card small${statistic === route.params.statistic ? " chosen" : ""}`, id: `of-${statistic}` },
      el("h3", {}, words(statistic)), el("p", { class: "quiet" }, meaning), chart, value);
    cards.set(statistic, { statistic, node, chart, value, lines: null, drawn: "" });
    seen.observe(node);
    return node;
  }

  function controls(detail) {
    const known = roles?.filter((role) => detail.roles.includes(role)) ?? [];
    // Whoever comes from a map of another tensor wants to see that one too.
    roles = known.length ? known : detail.roles.filter((role) => wire.ROLES.includes(role) || role === route.params.role);
    if (!roles.length) roles = detail.roles.slice(0, 3);
    $("roles").replaceChildren(...detail.roles.map((role) => {
      const box = el("input", { type: "checkbox", checked: roles.includes(role) });
      box.onchange = () => {
        const chosen = detail.roles.filter((each) => (each === role ? box.checked : roles.includes(each)));
        if (!chosen.length) {
          box.checked = true; // nothing would be left to see
          return;
        }
        roles = chosen;
        page.replaceParams({ roles: roles.join(","), role: null });
        page.jobs.now(charts, table);
      };
      const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `var(${LINES[detail.roles.indexOf(role) % LINES.length]})`;
      return el("label", {}, box, swatch, words(role));
    }));
    choices("layer-format", [["", "as used"], ...detail.formats], format, (value) => {
      format = value;
      page.replaceParams({ format: value || null });
      page.jobs.now(charts);
    });
    const at = detail.layers.indexOf(layer);
    neighbour("layer-before", detail.layers[at - 1]);
    neighbour("layer-after", detail.layers[at + 1]);
    $("layer-place").textContent = at < 0 ? "" : `layer ${at + 1} of ${detail.layers.length}`;
    $("layer-unknown").hidden = at >= 0;
    $("layer-unknown").textContent = `This run has no layer ${layer}. It may have another name in this run; choose one from the run's page.`;
  }

  const address = (name) => ({ view: "layer", project: run.project, run: run.name, layer: name, params: { ...page.route.params } });

  function neighbour(id, name) {
    $(id).hidden = name === undefined;
    if (name === undefined) return;
    $(id).href = href(address(name));
    $(id).title = name;
    onPlainClick($(id), () => page.go(address(name)));
  }

  const key = () => JSON.stringify([roles, format, steps.range(), page.run.lastStep]);

  const charts = page.jobs.add(2000, async (current) => {
    if (page.detail?.of !== page.run.attempts) {
      const detail = await wire.detail(run);
      if (!current()) return;
      page.detail = { ...detail, of: page.run.attempts };
      controls(detail);
      page.jobs.now(table);
    }
    if (!page.detail.layers.includes(layer)) return;
    const wanted = key();
    const due = [...cards.values()].filter((each) => each.node.inView && each.drawn !== wanted);
    await Promise.all(due.map(async (each) => {
      const series = await Promise.all(roles.map((role) => soon(() =>
        wire.tensor(run, { layer, role, statistic: each.statistic, format }, steps.range(), POINTS))));
      if (!current() || wanted !== key()) return;
      each.drawn = wanted;
      each.lines = roles.map((role, i) => ({ name: words(role), role, series: series[i], place: page.detail.roles.indexOf(role) })).filter((line) => line.series.step.length);
      await draw(each);
    }));
    const known = [...cards.values()].filter((each) => each.lines !== null);
    const without = known.filter((each) => !each.lines.length).map((each) => words(each.statistic));
    $("layer-empty").hidden = known.length < cards.size || without.length < known.length;
    $("not-recorded").textContent = without.length ? `Not recorded: ${without.join(", ")}.` : "";
  });

  async function draw(each) {
    const some = Boolean(each.lines?.length);
    each.node.hidden = !some;
    if (!some) return;
    const { statistic, lines } = each;
    await paint(each.chart, () => linesFigure({ lines, log: isLog(statistic), step: steps.step, range: steps.range(), small: true }));
    listen(each.chart, { zoomed: steps.zoom, picked: steps.pick });
    readout(each);
  }

  /** The numbers of the chosen step, or of the newest one. */
  function readout({ lines, value }) {
    value.replaceChildren(...lines.map(({ name, series }) => {
      const at = steps.step === null ? series.step.length - 1 : nearest(series.step, steps.step);
      return el("span", { title: `step ${series.step[at]}` }, `${name} `, el("b", {}, short(series.value[at])));
    }));
  }

  const drawAll = () => [...cards.values()].filter((each) => each.lines?.length).forEach(draw);

  const table = page.jobs.add(10000, async (current) => {
    if (!page.detail?.layers.includes(layer) || page.run.lastStep === null) return;
    const role = roles[0];
    formats = await layerFormats(page.run, layer, role, page.detail);
    if (!current()) return;
    $("formats-title").textContent = `Formats, ${words(role)}: worst of the newest steps`;
    $("formats").tHead.replaceChildren(el("tr", {}, el("th", { scope: "col" }, "Format"), ...FORMAT_COLUMNS.map((each) => el("th", { scope: "col", class: "number" }, words(each)))));
    $("formats").tBodies[0].replaceChildren(...formats.map((row) => el("tr", {}, el("th", { scope: "row" }, row.format), ...row.values.map((value) => el("td", { class: "number" }, short(value))))));
    $("formats").hidden = !formats.length;
    $("formats-note").textContent = formats.length > 1 ? "" : "Only the format in use is measured: watch(what_if=[...]) adds others.";
  });

  return {
    title: `${layer} · ${run.name}`,
    up: { view: "run", project: run.project, run: run.name, params: pickParams(route.params) },
    runsChanged() {},
    recordsCame: () => page.jobs.mark(charts, table),
    list: () => [],
    walk: (by) => steps.walk(by, [...cards.values()].find((each) => each.lines?.length)?.lines[0].series.step ?? []),
    allSteps: () => steps.zoom(null),
    previous: () => !$("layer-before").hidden && $("layer-before").click(),
    next: () => !$("layer-after").hidden && $("layer-after").click(),
    crumbs: () => [el("a", { href: run.href }, run.name), el("span", { "aria-current": "page" }, layer)],
    close: () => seen.disconnect(),
  };
}

const pickParams = ({ from, to, attempt, step, statistic }) => ({ from, to, attempt, step, statistic });
