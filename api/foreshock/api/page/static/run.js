// One run, live: loss with the risk behind it, what drives the risk, layers by steps, diagnosis, alarms, what-if.

import { $, choices, contentOr, el } from "./dom.js";
import { listen, paint } from "./charts.js";
import { linesFigure, lossFigure, riskFigure } from "./figures.js";
import { heatCard } from "./heatcard.js";
import * as panels from "./panels.js";
import { href, sideText } from "./routes.js";
import { steps as stepsOf } from "./steps.js";
import { words } from "./text.js";
import { timeline } from "./timeline.js";
import { whatIfCard } from "./whatif.js";
import * as wire from "./wire.js";

const LOG_SCALARS = /^(grad_norm|learning_rate|update_ratio|param_norm|loss_scale)$/;
const FIRST_SCALARS = ["grad_norm", "update_ratio", "learning_rate"];

export function open(page, route) {
  const { run } = page;
  const shown = { alarms: [], alerts: [], risk: null, history: null, horizons: [], loss: null, scalar: null };
  let log = route.params.log === "1";
  let name = route.params.scalar ?? null;
  const steps = stepsOf(page, route, {
    changed: () => page.jobs.now(fast, heat.job, scalar),
    moved: () => {
      draw();
      heat.draw();
      panels.incident(page.run, incidentStep());
      page.jobs.now(cause);
    },
  });
  const incidentStep = () => steps.step ?? shown.alarms.at(0)?.step ?? page.run.lastStep;
  const common = () => ({ alarms: shown.alarms, step: steps.step, range: steps.range() });

  panels.heading(run, null);
  panels.incident(run, run.lastStep);
  panels.tiles(null);
  $("log").checked = log;
  $("log").onchange = () => {
    log = $("log").checked;
    page.replaceParams({ log: log ? 1 : null });
    draw();
  };

  /** Charts that need no new answer: another scale, another step. */
  function draw() {
    const horizon = shown.horizons.includes("100") ? "100" : shown.horizons.at(-1);
    const drawn = [];
    if (shown.loss?.step.length) drawn.push(paint($("loss"), () => lossFigure({ ...common(), loss: shown.loss, risk: shown.history, horizon, log })));
    if (shown.horizons.length) drawn.push(paint($("risk"), () => riskFigure({ ...common(), risk: shown.history, horizons: shown.horizons })));
    if (shown.scalar?.step.length) drawn.push(drawScalar());
    return Promise.all(drawn);
  }

  const drawScalar = () => paint($("scalar"), () => linesFigure({
    ...common(), lines: [{ name: words(name), series: shown.scalar, place: 0 }], log: LOG_SCALARS.test(name),
  }));

  const act = async (work) => {
    await work().catch(page.failed);
    page.jobs.now(fast);
  };

  const fast = page.jobs.add(1000, async (current) => {
    if (page.detail?.of !== page.run.attempts) await details(current);
    const range = steps.range();
    const [risk, history, loss, alerts] = await Promise.all([
      wire.risk(run), wire.history(run, range), wire.scalar(run, "loss", range), wire.alerts(run)]);
    if (!current()) return;
    const alarms = wire.alarms(alerts);
    if (alarms.length !== shown.alarms.length) page.jobs.mark(heat.job); // the map marks them too
    const horizons = Object.keys(history.probability).filter((h) => history.probability[h].some((p) => p !== null));
    // The middle horizon is the one to act on; where it has no answer, the longest that has one.
    Object.assign(shown, { alarms, alerts, risk, loss, horizons, history: history.step.length ? history : null });
    panels.heading(page.run, risk);
    panels.incident(page.run, incidentStep());
    panels.tiles(risk);
    panels.reasons(risk);
    panels.drivers(run, risk);
    contentOr("alarms", alerts.length ? null : "No alarm for this run.");
    timeline({ list: $("alarms"), scale: $("alarms-scale"), rows: alerts, run: page.run, act, only: route.params.alert ?? null });
    contentOr("loss", loss.step.length ? null : page.run.lastStep === null ? "This run has sent no record yet." : "This run has not reported a loss here.");
    contentOr("risk", horizons.length ? null : panels.noForecast(risk));
    $("loss-csv").href = wire.address(run, "/series", { name: "loss", attempt: range.attempt, points: 20000, as: "csv" });
    $("risk-csv").href = wire.address(run, "/risk/history", { attempt: range.attempt, points: 10000, as: "csv" });
    await draw();
    if (!current()) return;
    for (const id of ["loss", "risk"]) if ($(id).data) listen($(id), { zoomed: steps.zoom, picked: steps.pick });
    describe(loss);
  });

  /** What a chart shows, for those who cannot see it. */
  function describe(loss) {
    const known = loss.value.filter((value) => typeof value === "number");
    const said = known.length ? `, ${known[0].toPrecision(3)} at step ${loss.step[0]}, ${known.at(-1).toPrecision(3)} at step ${loss.step.at(-1)}` : "";
    $("loss").setAttribute("aria-label", `Loss per step with divergence risk behind it${said}, ${shown.alarms.length} alarms`);
  }

  async function details(current) {
    const detail = await wire.detail(run);
    if (!current()) return;
    page.detail = { ...detail, of: page.run.attempts, key: JSON.stringify([detail.roles, detail.formats, detail.layers.length]) };
    const scalars = detail.scalars.filter((each) => each !== "loss");
    name = scalars.includes(name) ? name : FIRST_SCALARS.find((each) => scalars.includes(each)) ?? scalars[0] ?? null;
    choices("scalar-name", scalars, name, (value) => {
      name = value;
      page.replaceParams({ scalar: value });
      page.jobs.now(scalar);
    });
    $("attempt-choice").hidden = detail.history.length < 2;
    choices("attempt", [["", "newest at each step"], ...detail.history.map((n) => [String(n), `attempt ${n}`])], String(steps.attemptNumber ?? ""),
      (value) => steps.attempt(value ? Number(value) : null));
    const [last, before] = [detail.history.at(-1), detail.history.at(-2)];
    $("compare-link").href = href({ view: "compare", params: before ? { a: sideText(run, before), b: sideText(run, last) } : { a: sideText(run) } });
    page.jobs.now(heat.job, scalar, whatif);
  }

  const scalar = page.jobs.add(1500, async (current) => {
    if (!page.detail) return;
    const wanted = name;
    const series = wanted ? await wire.scalar(run, wanted, steps.range()) : { step: [] };
    if (!current() || wanted !== name) return;
    shown.scalar = series;
    contentOr("scalar", series.step.length ? null : "No other scalar recorded.");
    if (!series.step.length) return;
    await drawScalar();
    listen($("scalar"), { zoomed: steps.zoom, picked: steps.pick });
  });

  const heat = heatCard(page, run, route, steps, () => shown.alarms);
  const whatif = whatIfCard(page, run, () => heat.chosen.role ?? "input");

  const cause = page.jobs.add(5000, async (current) => {
    const at = steps.step;
    const answer = page.run.lastStep === null ? wire.NO_DIAGNOSIS : await wire.diagnosis(run, at);
    if (current()) panels.diagnosis(run, answer, shown.risk?.state ?? page.run.state, at);
  });

  return {
    title: run.name,
    up: { view: "fleet" },
    runsChanged() {
      panels.heading(page.run, shown.risk);
    },
    recordsCame: () => page.jobs.mark(),
    list: () => [...$("heat-worst").querySelectorAll("a")],
    filter: () => $("match"),
    walk: (by) => steps.walk(by, shown.loss?.step ?? []),
    toggleLog: () => $("log").click(),
    allSteps: () => steps.zoom(null),
    crumbs: () => [el("span", { "aria-current": "page" }, run.name)],
    close() {},
  };
}
