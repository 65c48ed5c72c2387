// The alarms of all runs, newest first, on one line of time.

import { $, choices } from "./dom.js";
import { timeline } from "./timeline.js";
import * as wire from "./wire.js";

const STATES = [["", "all"], ["firing", "firing"], ["pending", "pending"], ["resolved", "resolved"]];

export function open(page, route) {
  let state = STATES.some(([value]) => value === route.params.state) ? route.params.state : "";
  choices("alarm-state", STATES, state, (value) => {
    state = value;
    page.replaceParams({ state: value || null });
    page.jobs.now(job);
  });
  const act = async (work) => {
    await work().catch(page.failed);
    page.jobs.now(job);
  };
  const job = page.jobs.add(2000, async (current) => {
    const rows = await wire.alerts(null, state || null);
    if (!current()) return;
    $("alarms-empty").hidden = rows.length > 0;
    $("alarms-empty").textContent = state ? `No alarm is ${state}.` : "No alarm so far.";
    timeline({ list: $("alarms"), scale: $("alarms-scale"), rows, run: null, act, only: route.params.alert ?? null });
  });
  return {
    title: "Alarms",
    runsChanged: () => page.jobs.mark(job),
    list: () => [...$("alarms").querySelectorAll("summary")],
    close() {},
  };
}
