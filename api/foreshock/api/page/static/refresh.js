// When what is fetched again: each job at most so often, never twice at a time, and only while somebody looks.

const TICK = 200; // ms

export class Jobs {
  /** `failed` is told every error, and says whether the same is worth another try. */
  constructor(failed) {
    Object.assign(this, { jobs: [], closed: false, failed });
    this.timer = setInterval(() => this.tick(), TICK);
  }

  /** `work` gets a function that says whether its answer is still wanted. */
  add(every, work) {
    const job = { every, work, due: true, busy: false, last: -Infinity };
    this.jobs.push(job);
    return job;
  }

  /** Something has changed. */
  mark(...jobs) {
    for (const job of jobs.length ? jobs : this.jobs) job.due = true;
  }

  /** A reader is waiting: as soon as what is under way is done. */
  now(...jobs) {
    for (const job of jobs.length ? jobs : this.jobs) Object.assign(job, { due: true, last: -Infinity });
    this.tick();
  }

  tick() {
    if (document.hidden || this.closed) return;
    const now = performance.now();
    for (const job of this.jobs) if (job.due && !job.busy && now - job.last >= job.every) this.run(job, now);
  }

  async run(job, now) {
    Object.assign(job, { due: false, busy: true, last: now });
    try {
      await job.work(() => !this.closed);
    } catch (error) {
      if (!this.closed && this.failed(error)) job.due = true;
    } finally {
      job.busy = false;
    }
  }

  close() {
    this.closed = true;
    clearInterval(this.timer);
  }
}

/** At most so many at a time, in order; for what a page asks for by the dozen. */
export function queue(width) {
  let running = 0;
  const waiting = [];
  const next = () => {
    if (running >= width || !waiting.length) return;
    running += 1;
    const { work, resolve, reject } = waiting.shift();
    work().then(resolve, reject).finally(() => {
      running -= 1;
      next();
    });
  };
  return (work) => new Promise((resolve, reject) => {
    waiting.push({ work, resolve, reject });
    next();
  });
}
