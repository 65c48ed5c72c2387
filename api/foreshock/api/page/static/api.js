// Speaks with the service: one fetch for every call, non-finite numbers decoded, failures told apart.

export class Gone extends Error {} // no answer: the service is down or restarting
export class Refused extends Error {} // 401: a token is needed
export class Forbidden extends Error {} // 403: the session may look only
export class Unknown extends Error {} // 404
export class Failed extends Error { // anything else; the message is the service's own
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const WORDS = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };

/** A number as the wire spells it; null stays null (not measured). */
export const number = (value) => (typeof value === "string" ? (WORDS[value] ?? null) : (value ?? null));

/** The same for drawing: only finite values have a place on an axis. */
export const drawable = (value) => {
  const decoded = number(value);
  return Number.isFinite(decoded) ? decoded : null;
};

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-cache", ...options, signal: AbortSignal.timeout(20000) });
  } catch (error) {
    throw new Gone(error.message);
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  const text = problem.detail || problem.title || `the service answered ${response.status}`;
  if (response.status === 401) throw new Refused(text);
  if (response.status === 403) throw new Forbidden(text);
  if (response.status === 404) throw new Unknown(text);
  if ([502, 503, 504].includes(response.status)) throw new Gone(text);
  throw new Failed(text, response.status);
}

export async function get(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const tail = given.length ? `?${new URLSearchParams(given)}` : "";
  const response = await send(`/api/v1${path}${tail}`);
  try {
    return await response.json();
  } catch (error) {
    throw new Gone(error.message); // the connection ended in the middle of the answer
  }
}

export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return send(path, { method: "POST", headers, body: JSON.stringify(body) });
}

/** Server-sent events of one run; calls back on each and on every change of the connection. */
export class Stream {
  constructor(path, onEvent, onState) {
    Object.assign(this, { path, onEvent, onState, delay: 500, source: null, timer: null });
    this.open();
  }

  open() {
    this.source = new EventSource(this.path);
    this.source.onopen = () => {
      this.delay = 500;
      this.onState(true);
    };
    const heard = (event) => this.onEvent(event);
    for (const name of ["step", "risk", "alert", "reset"]) this.source.addEventListener(name, heard);
    this.source.onerror = () => this.retry();
  }

  // EventSource itself gives up for good on an HTTP error, so we always start a fresh one.
  retry() {
    this.source.close();
    this.onState(false);
    this.timer = setTimeout(() => this.open(), this.delay);
    this.delay = Math.min(8000, this.delay * 2);
  }

  close() {
    clearTimeout(this.timer);
    this.source.close();
  }
}
