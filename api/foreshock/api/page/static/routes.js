// The address of everything that can be looked at: #/run/PROJECT/RUN/layer/LAYER?step=412&statistic=kurtosis
// Pure: addresses in, routes out, and back. What stands behind the # never reaches the service.

const enc = encodeURIComponent;

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody's typing error
  }
}

/** A route: {view, params}, with project and run (project null: any), and layer. */
export function parse(hash) {
  const [path, query = ""] = hash.replace(/^#?\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decoded);
  const params = Object.fromEntries(new URLSearchParams(query));
  const [view, ...rest] = parts;
  if (!view || view === "fleet") return { view: "fleet", params };
  if (view === "run" && rest.length) {
    const at = rest.indexOf("layer");
    const names = at > 0 ? rest.slice(0, at) : rest;
    const [project, run] = names.length > 1 ? names : [null, names[0]];
    const layer = at > 0 ? rest.slice(at + 1).join("/") : null;
    return { view: layer ? "layer" : "run", project, run, ...(layer ? { layer } : {}), params };
  }
  if (["compare", "alarms", "forecaster"].includes(view)) return { view, params };
  return { view: "unknown", params };
}

export function href({ view, project, run, layer, params = {} }) {
  const path = { fleet: "#/", compare: "#/compare", alarms: "#/alarms", forecaster: "#/forecaster" }[view]
    ?? `#/run/${project === null || project === undefined ? "" : `${enc(project)}/`}${enc(run)}${layer ? `/layer/${enc(layer)}` : ""}`;
  const given = Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

/** The same place with other parameters; null takes one away. */
export const withParams = (route, changes) => ({ ...route, params: { ...route.params, ...changes } });

/** Old addresses, as alerts carry them: /?run=NAME-OR-ID&project=P&statistic=S */
export function fromQuery(search) {
  const { run, project, ...params } = Object.fromEntries(new URLSearchParams(search));
  return run ? { view: "run", project: project ?? null, run, params } : null;
}

/** One side of a comparison: PROJECT/RUN@ATTEMPT, the last part left out for the default view. */
export function side(text) {
  const found = /^(?:([^/]*)\/)?([^/@]+)(?:@(\d+))?$/.exec(text ?? "");
  return found ? { project: found[1] ?? null, run: found[2], attempt: found[3] ? Number(found[3]) : null } : null;
}

export const sideText = (run, attempt) => `${run.project}/${run.name}${attempt ? `@${attempt}` : ""}`;

/** A whole number from a parameter, or null. */
export function whole(text) {
  const value = text === undefined || text === null || text === "" ? NaN : Number(text);
  return Number.isInteger(value) && value >= 0 ? value : null;
}
