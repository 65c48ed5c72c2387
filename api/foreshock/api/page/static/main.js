// Puts the page together: which run is shown, when what is fetched again, and what to say when nothing is there.

import { Failed, Forbidden, Gone, Refused, Stream, Unknown, post } from "./api.js";
import { clear, drawHeat, drawLoss, drawRisk } from "./charts.js";
import { $, contentOr, el, show } from "./dom.js";
import * as panels from "./panels.js";
import * as wire from "./wire.js";

const RUNS_EVERY = 2000; // ms between looks at the list of runs
const FAST_EVERY = 1000; // ms at least between refreshes of risk and loss
const HEAT_EVERY = 3000; // ms at least between refreshes of the heatmap
const CAUSE_EVERY = 5000; // ms at least between refreshes of the diagnosis, the dearest answer
const SIGNED_IN = "foreshock-signed-in"; // only whether to offer signing out: the token itself is out of reach here

const idle = () => ({ fast: false, heat: false, cause: false });
const never = () => ({ fast: -Infinity, heat: -Infinity, cause: -Infinity });

const page = {
  runs: [], run: null, risk: null, stream: null, alarms: [], generation: 0,
  due: idle(), busy: idle(), last: never(),
};

const query = () => new URLSearchParams(location.search);

// ---- what the page says about itself

function connection(kind, text) {
  $("link").className = `link ${kind}`;
  $("link-text").textContent = text;
}

function reachable() {
  show("banner", false);
  connection("live", "live");
}

/** One place decides what a failed call means for the whole page. */
function failed(error) {
  if (error instanceof Gone) {
    $("banner").textContent = "The service does not answer. What you see is the last known state; this page tries again by itself.";
    show("banner", true);
    connection("lost", "no connection");
  } else if (error instanceof Refused) {
    signIn();
  } else if (error instanceof Forbidden) {
    $("banner").textContent = "This session may only look. To answer alerts, sign out, and in again with that box ticked.";
    show("banner", true);
  } else if (error instanceof Failed) {
    $("banner").textContent = `The service could not answer: ${error.message}`;
    show("banner", true);
  } else if (!(error instanceof Unknown)) {
    throw error;
  }
}

function signIn() {
  leave();
  page.runs = [];
  panels.runList([], null, choose);
  show("runs-empty", false);
  for (const id of ["view", "message"]) show(id, false);
  show("signin", true);
  connection("", "signed out");
}

function message(title, text) {
  for (const id of ["view", "signin"]) show(id, false);
  $("message-title").textContent = title;
  $("message-text").textContent = text;
  show("message", true);
}

// ---- the list of runs

async function refreshRuns() {
  try {
    page.runs = await wire.runs();
    show("signin", false);
    reachable();
  } catch (error) {
    failed(error);
    return;
  }
  const wanted = query().get("run");
  if (!page.run && !wanted && page.runs.length) open(page.runs.find((run) => run.state === "firing") ?? page.runs[0]);
  else if (wanted && (!page.run || page.run.gone)) follow(wanted);
  else if (page.run) update();
  if (!wanted && !page.runs.length) message("No runs yet", "As soon as a training run reports, it is shown here.");
  panels.runList(page.runs, page.run?.id, choose);
}

function find(name) {
  const project = query().get("project");
  // Links in alerts name a run by its id.
  return page.runs.find((run) => run.id === name || (run.name === name && (!project || run.project === project)));
}

function follow(name) {
  const run = find(name);
  if (run) open(run);
  else message(`No run called ${name}`, "It was deleted, or it has not reported yet. If it reports, it is shown here by itself.");
}

/** The chosen run as the fresh list has it. */
function update() {
  const run = page.runs.find((each) => each.id === page.run.id);
  if (!run) {
    const { name } = page.run;
    leave();
    page.run = { gone: true };
    message(`The run ${name} is gone`, "It was deleted on the service. Choose another run from the list.");
    return;
  }
  // The list knows no roles; a new attempt may bring new ones.
  if (run.attempts === page.run.attempts) run.roles = page.run.roles;
  const moved = run.lastStep !== page.run.lastStep || run.state !== page.run.state;
  page.run = run;
  panels.heading(run, page.risk);
  if (moved) mark();
}

function choose(run) {
  history.pushState(null, "", run.href);
  open(run);
  panels.runList(page.runs, run.id, choose);
}

function leave() {
  page.stream?.close();
  page.stream = null;
  page.run = null;
  page.risk = null;
  page.generation += 1;
}

function open(run) {
  leave();
  clear();
  page.run = run;
  page.alarms = [];
  document.title = `${run.name} · foreshock`;
  for (const id of ["message", "signin"]) show(id, false);
  show("view", true);
  panels.heading(run, null);
  panels.incident(run, []);
  panels.tiles(null);
  page.last = never();
  page.busy = idle();
  listen();
}

/** Only a page that is looked at holds a stream: a browser has six connections to us for all its tabs. */
function listen() {
  page.stream?.close();
  page.stream = null;
  if (document.hidden || !page.run || page.run.gone) return;
  page.stream = new Stream(wire.eventsPath(page.run), mark, (up) => up && reachable());
  mark();
}

// ---- the chosen run

const mark = () => {
  page.due = { fast: true, heat: true, cause: true };
};

/** Fetches again what is due, never twice at a time and never for a run no longer shown. */
async function turn(kind, every, work) {
  const now = performance.now();
  if (!page.run || page.run.gone || !page.due[kind] || page.busy[kind] || now - page.last[kind] < every || document.hidden) return;
  const { generation, run } = page;
  page.due[kind] = false;
  page.busy[kind] = true;
  page.last[kind] = now;
  try {
    await work(run, () => generation === page.generation);
  } catch (error) {
    if (generation === page.generation) {
      if (error instanceof Gone) page.due[kind] = true;
      failed(error);
    }
  } finally {
    if (generation === page.generation) page.busy[kind] = false;
  }
}

async function fast(run, current) {
  const [risk, history, loss, alerts] = await Promise.all([wire.risk(run), wire.history(run), wire.loss(run), wire.alerts(run)]);
  if (!current()) return;
  page.risk = risk;
  const alarms = wire.alarms(alerts);
  if (alarms.length !== page.alarms.length) page.due.heat = true; // the heatmap marks them too
  page.alarms = alarms;
  panels.alerts(alerts, judge);
  panels.incident(page.run, alarms);
  panels.heading(page.run, risk);
  panels.tiles(risk);
  panels.reasons(risk);
  panels.drivers(risk);
  const horizons = Object.keys(history.probability).filter((h) => history.probability[h].some((p) => p !== null));
  // The middle horizon is the one to act on; where it has no answer, the longest that has one.
  const horizon = horizons.includes("100") ? "100" : horizons.at(-1);
  const shown = { key: run.id, alarms: page.alarms, risk: history.step.length ? history : null };
  contentOr("loss", loss.step.length ? null : "This run has not reported a loss.");
  if (loss.step.length) drawLoss({ ...shown, loss, horizon, log: $("log").checked });
  contentOr("risk", horizons.length ? null : panels.noForecast(risk));
  if (horizons.length) drawRisk({ ...shown, horizons });
  page.drawn = { ...shown, loss, horizon };
}

async function heat(run, current) {
  if (!run.roles) {
    const roles = await wire.roles(run);
    if (!current()) return;
    page.run.roles = roles;
    if (roles.length) fill("role", roles, $("role").value);
  }
  const [statistic, role] = [$("statistic").value, $("role").value];
  const map = await wire.heat(run, statistic, role);
  if (!current()) return;
  const some = map.values.some((row) => row.some((value) => value !== null));
  contentOr("heat", some ? null : `No ${statistic} of ${role} recorded in this run.`);
  if (some) drawHeat({ key: run.id, heat: map, statistic, role, alarms: page.alarms });
}

async function cause(run, current) {
  const causes = await wire.diagnosis(run);
  if (current()) panels.diagnosis(causes, page.risk?.state ?? run.state);
}

async function judge(alert, verdict) {
  try {
    await post(`/api/v1/alerts/${encodeURIComponent(alert.id)}/feedback`, wire.feedback(verdict));
  } catch (error) {
    failed(error);
  }
  page.due.fast = true;
}

// ---- controls

function fill(id, values, preferred) {
  const wanted = query().get(id) ?? preferred;
  $(id).replaceChildren(...values.map((value) => el("option", { value, selected: value === wanted }, value.replaceAll("_", " "))));
  $(id).onchange = () => {
    const next = query();
    next.set(id, $(id).value);
    history.replaceState(null, "", `?${next}`);
    page.due.heat = true;
    page.last.heat = -Infinity;
  };
}

function controls() {
  fill("statistic", wire.STATISTICS, "kurtosis");
  fill("role", wire.ROLES, "input");
  $("log").onchange = () => page.drawn && drawLoss({ ...page.drawn, log: $("log").checked });
  $("signin-form").onsubmit = async (event) => {
    event.preventDefault();
    $("signin-error").textContent = "";
    try {
      const scopes = $("may-write").checked ? ["read", "write"] : ["read"];
      await post("/login", { token: $("token").value, scopes });
      $("signin-form").reset();
      localStorage.setItem(SIGNED_IN, "yes");
      show("signout", true);
      await refreshRuns();
    } catch (error) {
      $("signin-error").textContent = error instanceof Gone ? "The service does not answer." : error.message;
    }
  };
  show("signout", localStorage.getItem(SIGNED_IN) !== null);
  $("signout").onclick = async () => {
    await post("/logout", {}).catch(failed);
    localStorage.removeItem(SIGNED_IN);
    location.reload();
  };
  addEventListener("popstate", () => {
    const run = find(query().get("run")) ?? page.runs[0];
    if (run) open(run);
    panels.runList(page.runs, page.run?.id, choose);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", mark);
  document.addEventListener("visibilitychange", listen);
  // A page kept for the back button counts as hidden only after its connections were kept too.
  addEventListener("pagehide", () => page.stream?.close());
  addEventListener("pageshow", (event) => event.persisted && listen());
}

async function everyTwoSeconds() {
  try {
    if (!document.hidden) await refreshRuns();
  } finally {
    setTimeout(everyTwoSeconds, RUNS_EVERY); // whatever went wrong, the next look may go right
  }
}

controls();
everyTwoSeconds();
setInterval(() => {
  turn("fast", FAST_EVERY, fast);
  turn("heat", HEAT_EVERY, heat);
  turn("cause", CAUSE_EVERY, cause);
}, 200);
