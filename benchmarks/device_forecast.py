"""Choose, judge and fit the forecaster where a large corpus lies: many processes, partial results.

`python -m benchmarks.device_forecast build/corpus --out DIR --minutes 6 --processes 16` loads the
corpus, compares the candidates on half of the groups by leaving out each family of failures, takes
the best, fits the artifact with it, and judges it on everything the protocol asks for, the most
important first, until the time is over. Every finished job is a line of `jobs.jsonl` at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from foreshock.api.artifact import Head, load_shipped, save
from foreshock.api.baselines import BASELINES, SHIPPED_RULES
from foreshock.api.corpus import CorpusRun, load_corpus
from foreshock.api.evaluation import outcomes_of
from foreshock.api.features import FEATURES
from foreshock.api.fitting import (
    BUDGETS,
    Series,
    artifact_of,
    fit_forecaster,
    fit_head,
    held_out_series,
    risks_of,
    threshold_for,
)
from foreshock.api.forecaster import DivergenceForecaster
from foreshock.api.model_card import FIRST_HEADS, HEADS
from foreshock.api.outcomes import Outcome, figures
from foreshock.api.proportional import CoxForecaster
from foreshock.api.quality import risk_quality
from foreshock.api.splits import Split, grouped_folds, left_out
from foreshock.api.trees import BoostedForecaster, ForestForecaster

_BROKEN: Final = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_ABLATED: Final[Mapping[str, tuple[str, ...]]] = {
    "loss": ("loss",),
    "gradient norm": ("grad_norm",),
    "update ratio": ("update_ratio", "param_norm"),
    "input side": ("input",),
    "weight side": ("weight",),
    "output gradient side": ("grad_output",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A model and what it sees."""

    prototype: DivergenceForecaster
    features: tuple[str, ...]


def _models(small: bool) -> dict[str, DivergenceForecaster]:
    size = 25 if small else 60
    few: dict[str, Any] = {"folds": 3} if small else {"folds": 4}
    return {
        "logistic": DivergenceForecaster(**few),
        "boosted": BoostedForecaster(rounds=size, **few),
        "cox": CoxForecaster(**few),
        "forest": ForestForecaster(trees=size, **few),
    }


def _candidates(small: bool) -> dict[str, _Candidate]:
    table = {
        f"{model}, {head}": _Candidate(prototype=prototype, features=HEADS[head])
        for head in HEADS
        for model, prototype in _models(small).items()
    }
    boosted = _models(small)["boosted"]
    table["boosted, every feature"] = _Candidate(prototype=boosted, features=FEATURES)
    table["logistic, features of before"] = _Candidate(
        prototype=DivergenceForecaster(), features=FIRST_HEADS["full"]
    )
    for name, gone in _ABLATED.items():
        kept = tuple(f for f in HEADS["full"] if f.split(".")[0] not in gone)
        for model, prototype in _models(small).items():
            table[f"{model}, without {name}"] = _Candidate(prototype=prototype, features=kept)
    return table


@dataclass(frozen=True, slots=True)
class _World:
    """What the processes share by forking: set once, before the first of them starts."""

    runs: dict[str, CorpusRun]
    candidates: dict[str, _Candidate]
    most: int
    rules: dict[str, dict[str, Any]]


_SHARED: list[_World] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One fit and test, or a set of rules (an empty candidate)."""

    stage: str
    title: str
    candidate: str
    seed: int
    train: tuple[str, ...]
    test: tuple[str, ...]


def _judge(job: _Job) -> list[dict[str, Any]]:
    world = _SHARED[0]
    train = [world.runs[name] for name in job.train]
    test = [world.runs[name] for name in job.test]
    began = time.perf_counter()
    rows = _rules(train, test) if not job.candidate else _forecast(world, job, train, test)
    seconds = round(time.perf_counter() - began, 1)
    facts = {"stage": job.stage, "title": job.title, "seed": job.seed, "seconds": seconds}
    return [facts | row for row in rows]


def _forecast(
    world: _World, job: _Job, train: list[CorpusRun], test: list[CorpusRun]
) -> list[dict[str, Any]]:
    candidate = world.candidates[job.candidate]
    prototype = candidate.prototype.set_params(random_state=job.seed)
    model = fit_forecaster(candidate.features, train, prototype, world.most)
    supported = [int(h) for h in np.array(model.horizons)[model.supported_]]
    if not supported:
        reason = next(iter(model.reasons_.values()), "nothing to fit")
        # A model that cannot be fitted raises no alarm: its events are missed, not left out.
        silent = [np.full(len(run.steps), np.nan) for run in test]
        found = [asdict(o) for o in outcomes_of(test, silent, np.inf)]
        return [
            {"method": job.candidate, "budget": b, "reason": reason, "outcomes": found}
            for b in BUDGETS
        ]
    at = max((h for h in supported if h <= 100), default=supported[0])
    position = [int(h) for h in model.horizons].index(at)
    risks = risks_of(candidate.features, model, test)
    series = held_out_series(candidate.features, model, train, at)
    rows = _outcomes(job.candidate, series, test, [risk[:, position] for risk in risks])
    quality = {}
    for place, horizon in enumerate(supported):
        pairs = [(run, risk[:, place], None) for run, risk in zip(test, risks, strict=True)]
        quality[str(horizon)] = asdict(risk_quality(pairs, horizon, model.gap))
    rows[0]["risk"] = quality
    return rows


def _rules(train: list[CorpusRun], test: list[CorpusRun]) -> list[dict[str, Any]]:
    rows = []
    of = _SHARED[0].rules
    for name in (*BASELINES, *SHIPPED_RULES):
        scores = [of[run.name][name] for run in test]
        if name in SHIPPED_RULES:
            found = outcomes_of(test, scores, 1.0)
            rows.append({"method": name, "budget": "own", "outcomes": [asdict(o) for o in found]})
            continue
        # A rule has one parameter: a few hundred runs tell its threshold.
        some = train[:: max(1, len(train) // 400)]
        series = [Series(of[r.name][name][r.judged], r.healthy[r.judged]) for r in some]
        rows += _outcomes(name, series, test, scores)
    return rows


def _outcomes(
    method: str, series: Sequence[Series], test: Sequence[CorpusRun], scores: Sequence[Any]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        threshold, reason = threshold_for(series, float(budget))
        row: dict[str, Any] = {"method": method, "budget": budget, "reason": reason}
        found = outcomes_of(test, scores, np.inf if threshold is None else threshold)
        row["outcomes"] = [asdict(o) for o in found]
        rows.append(row)
    return rows


def _rule_scores(run: CorpusRun) -> dict[str, Any]:
    rules = {**BASELINES, **SHIPPED_RULES}
    return {name: score(run.signals).astype(np.float32) for name, score in rules.items()}


def _fit(head: str, model: str) -> tuple[str, Head]:
    world = _SHARED[0]
    prototype = world.candidates[f"{model}, {head}"].prototype
    runs = [run for run in world.runs.values() if run.split == "fit"]
    return head, fit_head(head, runs, prototype, world.most)


def _shipped(runs: Sequence[CorpusRun]) -> list[dict[str, Any]]:
    """The artifact that comes with the package, with its own thresholds, on runs new to it."""
    artifact = load_shipped()
    if artifact is None:
        return []
    new = [run for run in runs if not artifact.trained_on(run.fingerprint)]
    rows: list[dict[str, Any]] = []
    for name, head in artifact.heads.items():
        risks = risks_of(head.features, head.forecaster, new)
        position = [int(h) for h in head.forecaster.horizons].index(head.alarm_horizon or 100)
        for budget, threshold in head.thresholds.items():
            scores = [risk[:, position] for risk in risks]
            found = outcomes_of(new, scores, np.inf if threshold is None else threshold)
            row = {"stage": "shipped", "title": "new runs", "seed": 0, "method": name}
            rows.append(row | {"budget": budget, "outcomes": [asdict(o) for o in found]})
    return rows


def _dev(group: str) -> bool:
    """Half of the groups, by their name: models are chosen on these."""
    return zlib.crc32(group.encode()) % 2 == 0


def _jobs(
    stage: str, splits: Sequence[Split], candidates: Sequence[str], seed: int = 0
) -> Iterator[_Job]:
    for split in splits:
        for candidate in candidates:
            yield _Job(
                stage=stage,
                title=split.title,
                candidate=candidate,
                seed=seed,
                train=tuple(run.name for run in split.train),
                test=tuple(run.name for run in split.test),
            )


class _Runner:
    """Hands jobs to processes, writes what comes back, stops at the end of the time."""

    def __init__(self, out: Path, processes: int, end: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self._out, self._end = out, end
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
        self._processes = processes

    def judge(self, jobs: Sequence[_Job], until: float | None = None) -> None:
        """Run jobs in order; those not begun in time are left."""
        end = min(self._end, until or self._end)
        queue = list(jobs)[::-1]
        running: dict[Future[Any], _Job] = {}
        while (queue and time.time() < end) or running:
            while queue and len(running) < self._processes and time.time() < end:
                job = queue.pop()
                running[self._pool.submit(_judge, job)] = job
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                self._take(running.pop(future), future)
            if time.time() > end + 40:
                break
        left = len(queue) + len(running)
        if left:
            print(f"{left} jobs were left: the time is over", flush=True)

    def _take(self, job: _Job, future: Future[Any]) -> None:
        try:
            rows = future.result()
        except _BROKEN:  # one broken job must not stop the others
            traceback.print_exc()
            return
        self.rows += rows
        with (self._out / "jobs.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                brief = {k: v for k, v in row.items() if k != "outcomes"}
                found = [Outcome(**o) for o in row.get("outcomes", ())]
                brief["figures"] = asdict(figures(row["method"], row["budget"], found))
                file.write(json.dumps(brief) + "\n")
        told = [figures(r["method"], r["budget"], [Outcome(**o) for o in r.get("outcomes", ())])
                for r in rows if r["budget"] == BUDGETS[-1]]  # fmt: skip
        shown = ", ".join(f"{f.method}: {f.forecast} of {f.events}" for f in told[:1])
        print(f"{job.stage} | {job.title} | {shown} | {rows[0]['seconds']} s", flush=True)

    def heads(self, model: str) -> list[Future[Any]]:
        """Begin to fit every head of the artifact."""
        return [self._pool.submit(_fit, head, model) for head in HEADS]

    def close(self) -> None:
        """Leave what still runs."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        # They hold the output open, and with it whatever reads that.
        for process in processes:
            process.kill()


def _choose(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The method whose worst left-out family (10 events or more) is best at the larger budget.

    Ties (0 above all) are decided by the mean over families.
    """
    table: dict[str, Any] = {}
    for method in methods:
        shares = {}
        for title in sorted({row["title"] for row in rows if row["stage"] == "choice"}):
            found = _pooled(rows, "choice", title, method, BUDGETS[-1])
            row = figures(method, BUDGETS[-1], found)
            if row.events >= 10 and row.forecast is not None:
                # What the budget allows is what counts: twice the false alarms are no win.
                shares[title] = row.forecast if (row.false_rate or 0) <= 2.0 else 0.0
        worst = min(shares.values(), default=0.0)
        mean = float(np.mean(list(shares.values()))) if shares else 0.0
        table[method] = {"worst": worst, "mean": mean, "families": shares}
    best = max(methods, key=lambda m: (round(table[m]["worst"], 2), table[m]["mean"]))
    return best, table


def _pooled(
    rows: Sequence[dict[str, Any]], stage: str, title: str, method: str, budget: str
) -> list[Outcome]:
    return [
        Outcome(**o)
        for row in rows
        if (row["stage"], row["title"], row["method"], row["budget"])
        == (stage, title, method, budget)
        for o in row.get("outcomes", ())
    ]


def _tables(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of every (stage, title, method, budget), pooled over parts and seeds, by class."""
    keys = dict.fromkeys((r["stage"], r["title"], r["method"], r["budget"]) for r in rows)
    tables = []
    for stage, title, method, budget in keys:
        found = _pooled(rows, stage, title, method, budget)
        if not found:
            continue
        row = {"stage": stage, "title": title} | asdict(figures(method, budget, found))
        for name, of in (("class", "event_class"), ("family", "family"), ("recipe", "recipe")):
            values = sorted({getattr(o, of) for o in found if o.onset is not None})
            row[f"by_{name}"] = {
                value: _brief([o for o in found if getattr(o, of) == value]) for value in values
            }
        tables.append(row)
    return tables


def _brief(found: Sequence[Outcome]) -> dict[str, Any]:
    row = figures("", "", found)
    return {"events": row.events, "forecast": row.forecast, "lead_median": row.lead_median}


def _markdown(tables: Sequence[dict[str, Any]], choice: str) -> str:
    lines = [
        f"Chosen: {choice}.",
        "",
        "| stage | split | method | budget | forecast (95 %) | events | detected | lead (share) |"
        " false per 10,000 | healthy runs alarmed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def shown(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for t in sorted(tables, key=lambda t: (t["stage"], t["title"], t["budget"], t["method"])):
        low, high = t["interval"] or (None, None)
        lines.append(
            f"| {t['stage']} | {t['title']} | {t['method']} | {t['budget']} |"
            f" {shown(t['forecast'])} ({shown(low)} to {shown(high)}) | {t['events']} |"
            f" {shown(t['detected'])} | {shown(t['lead_median'], 0)} ({shown(t['lead_share'])}) |"
            f" {shown(t['false_rate'])} | {shown(t['healthy_runs'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the whole of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rows", type=int, default=40_000, help="rows that a model is fitted on")
    parser.add_argument("--small", action="store_true", help="small models, for a trial")
    arguments = parser.parse_args()
    began = time.time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = load_corpus(arguments.corpus, processes=arguments.processes)
    print(f"{len(runs)} runs after {time.time() - began:.0f} s", flush=True)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        rules = list(pool.map(_rule_scores, runs, chunksize=4))
    print(f"rules after {time.time() - began:.0f} s", flush=True)
    names = [run.name for run in runs]
    world = _World(
        dict(zip(names, runs, strict=True)),
        _candidates(arguments.small),
        arguments.rows,
        dict(zip(names, rules, strict=True)),
    )
    _SHARED.append(world)
    end = began + 60 * arguments.minutes
    runner = _Runner(arguments.out, arguments.processes, end - 45)
    _everything(runs, runner, arguments, began)
    runner.close()
    os._exit(0)  # whatever still computes is over its time


def _everything(
    runs: list[CorpusRun], runner: _Runner, arguments: argparse.Namespace, began: float
) -> None:
    fit = [run for run in runs if run.split == "fit"]
    names = list(_models(arguments.small))
    full = [f"{name}, full" for name in names]
    families = {f"without {run.family}" for run in fit if run.label.diverges}
    dev = [run for run in fit if _dev(run.group)]
    choice = [s for s in left_out(dev) if s.title in families]
    everywhere = left_out(fit)
    until = began + 60 * arguments.minutes * 0.6
    runner.judge([*_jobs("choice", choice, full)], until)
    best, table = _choose(runner.rows, full)
    model = best.split(",")[0]
    print(f"chosen: {best} {json.dumps(table)}", flush=True)
    heads = runner.heads(model)
    jobs = [
        *_jobs("left out", [s for s in everywhere if s.title in families], [best, ""]),
        *_jobs("groups", grouped_folds(fit, 3), [best, ""]),
        *_jobs("left out", [s for s in everywhere if s.title not in families], [best]),
        *_jobs("groups", grouped_folds(fit, 3), [f"{model}, gradient", f"{model}, loss"]),
        *_jobs("groups", grouped_folds(fit, 3), [f"{model}, layers"]),
        *_width_jobs(fit, runs, best),
        *_jobs("groups", grouped_folds(fit, 3), [name for name in full if name != best]),
        *_jobs("groups", grouped_folds(fit, 3), [f"{model}, without {n}" for n in _ABLATED]),
        *_jobs("groups", grouped_folds(fit, 3), ["logistic, features of before"]),
        *_jobs("groups", grouped_folds(fit, 3), ["boosted, every feature"]),
        *(
            job
            for seed in (1, 2)
            for job in _jobs(
                f"left out, seed {seed}",
                [s for s in left_out(fit, seed) if s.title in families],
                [best],
                seed,
            )
        ),
        *_jobs("groups, seed 1", grouped_folds(fit, 3, 1), [best], 1),
        *_jobs("groups, seed 2", grouped_folds(fit, 3, 2), [best], 2),
        *_jobs("left out", [s for s in everywhere if s.title not in families], [""]),
    ]
    facts = {"choice": table, "chosen": best}
    writer = threading.Thread(target=_write_artifact, args=(heads, fit, arguments.out, facts))
    writer.start()
    runner.judge(jobs)
    writer.join(timeout=5)
    runner.rows += _shipped(fit)
    tables = _tables(runner.rows)
    report = {"runs": len(fit), "choice": table, "chosen": best, "tables": tables}
    report["minutes"] = round((time.time() - began) / 60, 1)
    (arguments.out / "forecast.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    (arguments.out / "forecast.md").write_text(_markdown(tables, best), encoding="utf-8")
    print(f"done after {time.time() - began:.0f} s", flush=True)


def _width_jobs(fit: list[CorpusRun], runs: list[CorpusRun], best: str) -> Iterator[_Job]:
    """Larger models than any that was trained on."""
    larger = [run for run in runs if run.split != "fit"]
    if larger:
        yield from _jobs("left out", [Split(title="larger", train=fit, test=larger)], [best, ""])


def _write_artifact(
    futures: Sequence[Future[Any]], fit: list[CorpusRun], out: Path, card: dict[str, Any]
) -> None:
    """The artifact as soon as its heads are there; the report is added to its card later."""
    try:
        heads = dict(future.result() for future in futures)
        save(artifact_of({name: heads[name] for name in HEADS}, fit, card), out / "artifact")
        print("artifact written", flush=True)
    except _BROKEN:  # the figures are worth having without it
        traceback.print_exc()


if __name__ == "__main__":
    main()
