// Puts the page together: which view stands at an address, what runs there are, and what to say when nothing is there.

import * as alarms from "./alarms.js";
import { Failed, Forbidden, Gone, Refused, Stream, Unknown, post } from "./api.js";
import { repaint, wipe } from "./charts.js";
import * as comparing from "./comparing.js";
import { $, el, mount, show } from "./dom.js";
import * as fleet from "./fleet.js";
import { keyboard } from "./keyboard.js";
import * as layer from "./layer.js";
import * as model from "./model.js";
import { Jobs } from "./refresh.js";
import { fromQuery, href, parse, withParams } from "./routes.js";
import * as run from "./run.js";
import { THEMES, remember, remembered, setTheme, theme } from "./settings.js";
import * as wire from "./wire.js";

const RUNS_EVERY = 2000; // ms between looks at the list of runs
const VIEWS = { fleet, run, layer, compare: comparing, alarms, forecaster: model };

/** What the views know of each other: runs, the run that is shown, the address, and what fetches when. */
const page = {
  runs: [], run: null, detail: null, route: parse(location.hash), view: null, jobs: null, stream: null, known: false,
  go(route) {
    location.hash = href(route);
  },
  replaceParams(changes) {
    page.route = withParams(page.route, changes);
    history.replaceState(null, "", href(page.route));
  },
  /** By id, or by name; without a project the first of that name. */
  find({ run: name, project }) {
    return page.runs.find((each) => each.id === name || (each.name === name && (!project || each.project === project)));
  },
  failed,
};

// ---- what the page says about itself

function connection(kind, text) {
  $("link").className = `link ${kind}`;
  $("link-text").textContent = text;
}

/** Stays for some seconds at least: an answer to the next question must not wipe it away unread. */
function banner(text, seconds = 0) {
  $("banner").textContent = text;
  show("banner", true);
  banner.until = performance.now() + 1000 * seconds;
}

function reachable() {
  if (performance.now() >= (banner.until ?? 0)) show("banner", false);
  connection("live", "live");
}

/** One place decides what a failed call means for the whole page. Returns whether the same may go right later. */
function failed(error) {
  if (error instanceof Gone) {
    banner("The service does not answer. What you see is the last known state; this page tries again by itself.");
    connection("lost", "no connection");
    return true;
  }
  if (error instanceof Refused) signIn();
  else if (error instanceof Forbidden) banner("This session may only look. To answer alarms, sign out, and in again with that box ticked.", 8);
  else if (error instanceof Failed) banner(`The service could not answer: ${error.message}`, 8);
  else if (!(error instanceof Unknown)) throw error;
  return false;
}

function message(title, text) {
  leave();
  mount("message");
  $("message-title").textContent = title;
  $("message-text").textContent = text;
  document.title = `${title} · foreshock`;
}

function toast(text) {
  $("toast").textContent = text;
  show("toast", true);
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => show("toast", false), 2500);
}

// ---- views

function leave() {
  page.view?.close();
  page.jobs?.close();
  page.stream?.close();
  wipe($("main"));
  Object.assign(page, { view: null, jobs: null, stream: null, run: null, detail: null });
  $("crumbs").replaceChildren();
}

const ofRun = (route) => route.view === "run" || route.view === "layer";

function open(route) {
  leave();
  page.route = route;
  navigation(route);
  if (!VIEWS[route.view]) {
    message("There is nothing at this address", "It may have been cut short. Choose a view above.");
    return;
  }
  if (ofRun(route)) {
    const found = page.find(route);
    if (!found) {
      message(`No run called ${route.run}`, "It was deleted, or it has not reported yet. If it reports, it is shown here by itself.");
      return;
    }
    page.run = found;
    // The address that can be passed on names the project, whatever the way in was.
    page.route = { ...route, project: found.project, run: found.name };
    history.replaceState(null, "", href(page.route));
  }
  mount(route.view);
  page.jobs = new Jobs(failed);
  page.view = VIEWS[route.view].open(page, page.route);
  document.title = `${page.view.title} · foreshock`;
  const crumbs = page.view.crumbs?.() ?? [];
  $("crumbs").replaceChildren(...(crumbs.length ? [el("a", { href: "#/" }, "Fleet"), ...crumbs] : []).map((node) => el("li", {}, node)));
  page.view.runsChanged();
  listen();
}

function navigation(route) {
  const at = ofRun(route) ? "fleet" : route.view;
  for (const link of document.querySelectorAll("#views a")) {
    if (link.dataset.view === at) link.setAttribute("aria-current", ofRun(route) ? "true" : "page");
    else link.removeAttribute("aria-current");
  }
}

/** Only a page that is looked at holds a stream: a browser has six connections to us for all its tabs. */
function listen() {
  page.stream?.close();
  page.stream = null;
  if (document.hidden || !page.run || !page.view?.recordsCame) return;
  page.stream = new Stream(wire.eventsPath(page.run), () => page.view?.recordsCame(), (up) => up && reachable());
  page.view.recordsCame();
}

// ---- the list of runs

async function refreshRuns() {
  try {
    page.runs = await wire.runs();
    reachable();
  } catch (error) {
    failed(error);
    return;
  }
  const first = !page.known;
  page.known = true;
  if (first) open(page.route);
  else if (!ofRun(page.route)) page.view?.runsChanged();
  else if (page.run) update();
  else if (page.find(page.route)) open(page.route);
}

/** The shown run as the fresh list has it. */
function update() {
  const fresh = page.runs.find((each) => each.id === page.run.id);
  if (!fresh) {
    message(`The run ${page.run.name} is gone`, "It was deleted on the service. Choose another run from the fleet.");
    return;
  }
  const moved = ["lastStep", "state", "attempts", "status"].some((name) => fresh[name] !== page.run[name]);
  page.run = fresh;
  page.view.runsChanged();
  if (moved) page.view.recordsCame?.();
}

// ---- signing in

function signIn() {
  if ($("signin-form")) return;
  leave();
  Object.assign(page, { runs: [], known: false });
  mount("signin");
  connection("", "signed out");
  $("signin-form").onsubmit = async (event) => {
    event.preventDefault();
    $("signin-error").textContent = "";
    try {
      const scopes = $("may-write").checked ? ["read", "write"] : ["read"];
      await post("/login", { token: $("token").value, scopes });
      $("signin-form").reset();
      remember("signedIn", "yes");
      show("signout", true);
      await refreshRuns();
    } catch (error) {
      $("signin-error").textContent = error instanceof Gone ? "The service does not answer." : error.message;
    }
  };
}

// ---- controls that are always there

function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
  themeShown();
  repaint();
}

function themeShown() {
  $("theme-text").textContent = theme();
}

async function copyAddress() {
  try {
    await navigator.clipboard.writeText(location.href);
    toast("Address copied");
  } catch {
    toast("Copy the address from the bar above: this browser does not let the page do it");
  }
}

/** The run before or after this one in the order of their names. */
function neighbour(by) {
  if (!page.run) return;
  const names = [...page.runs].sort((a, b) => a.name.localeCompare(b.name));
  const next = names[names.findIndex((each) => each.id === page.run.id) + by];
  if (next) page.go({ view: "run", project: next.project, run: next.name });
}

function controls() {
  themeShown();
  $("theme").onclick = nextTheme;
  $("copy").onclick = copyAddress;
  $("skip").onclick = (event) => {
    event.preventDefault(); // what follows # is the view
    $("main").focus();
  };
  show("signout", remembered("signedIn") !== null);
  $("signout").onclick = async () => {
    await post("/logout", {}).catch(failed);
    remember("signedIn", null);
    location.reload();
  };
  keyboard(page, { nextTheme, copyAddress, neighbour });
  addEventListener("hashchange", () => {
    const route = parse(location.hash);
    if (!page.known) page.route = route;
    else if (href(route) !== href(page.route)) {
      open(route);
      $("main").focus({ preventScroll: true });
      scrollTo(0, 0);
    }
  });
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", repaint);
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

const old = fromQuery(location.search);
if (old) {
  history.replaceState(null, "", `${location.pathname}${href(old)}`);
  page.route = old;
}
controls();
everyTwoSeconds();
