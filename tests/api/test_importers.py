"""Readers of other people's logs: files by the libraries that write them, and damaged ones."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.cli.importers import Imported, ImportProblem, read_logs
from foreshock.monitor.record import StepRecord

VALUES = [3.5, math.nan, math.inf, -math.inf, 1e-30]


def attempts(imported: Imported) -> list[tuple[StepRecord, ...]]:
    (run,) = imported.runs
    return list(run.attempts)


def scalars(records: tuple[StepRecord, ...]) -> dict[int, dict[str, float]]:
    return {record.step: dict(record.scalars) for record in records}


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@pytest.mark.long
def test_state_of_a_trainer_keeps_what_is_not_finite(tmp_path: Path) -> None:
    from transformers.trainer_callback import TrainerState

    for count in (2, 5):  # two checkpoints of one training
        state = TrainerState(global_step=count)
        for step, value in enumerate(VALUES[:count], 1):
            state.log_history.append(
                {"loss": value, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.1, "step": step}
            )
        state.log_history.append({"eval_loss": 9.0, "step": count})
        state.save_to_json(str(tmp_path / "trainer_state.json"))
        folder = tmp_path / "out" / f"checkpoint-{count}"
        folder.mkdir(parents=True)
        (tmp_path / "trainer_state.json").rename(folder / "trainer_state.json")
    imported = read_logs(tmp_path / "out")
    (records,) = attempts(imported)
    assert [r.step for r in records] == [1, 2, 3, 4, 5]
    assert all(same(r.scalars["loss"], v) for r, v in zip(records, VALUES, strict=True))
    assert records[4].scalars["eval_loss"] == 9.0
    assert records[0].scalars["learning_rate"] == 1e-3
    assert imported.report.format == "hf"
    assert imported.report.nonfinite == 3


@pytest.mark.long
def test_log_of_a_real_trainer(tmp_path: Path) -> None:
    from tests.integrations.test_huggingface import trainer

    made = trainer(tmp_path, [], save_strategy="steps", save_steps=12)
    made.train()
    (records,) = attempts(read_logs(tmp_path))
    logged = [e for e in made.state.log_history if "loss" in e]
    assert len(logged) == 24
    assert [(r.step, r.scalars["loss"]) for r in records] == [
        (e["step"], e["loss"]) for e in logged
    ]


def write_events(folder: Path, first: int = 0) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for step, value in enumerate(VALUES, first):
        writer.add_scalar("train/loss", value, step)
        writer.add_scalar("eval/loss", 1.0, step)
    writer.add_histogram("weights", np.arange(10.0), first)
    writer.add_text("note", "hello", first)
    writer.close()
    (path,) = folder.glob("*tfevents*")
    return path


def test_event_files_of_tensorboard(tmp_path: Path) -> None:
    path = write_events(tmp_path / "a")
    imported = read_logs(path)
    (records,) = attempts(imported)
    assert all(
        same(r.scalars["loss"], float(np.float32(v))) for r, v in zip(records, VALUES, strict=True)
    )
    assert records[0].scalars["eval/loss"] == 1.0
    assert records[0].time.year >= 2026
    assert "weights (no scalar)" in imported.report.skipped
    write_events(tmp_path / "b")
    assert [run.name for run in read_logs(tmp_path).runs] == [
        f"{tmp_path.name}/a",
        f"{tmp_path.name}/b",
    ]


def test_a_damaged_event_file_says_what_is_lost(tmp_path: Path) -> None:
    whole = write_events(tmp_path / "a").read_bytes()
    cut = tmp_path / "events.out.tfevents.1.x"
    cut.write_bytes(whole[:500])
    imported = read_logs(cut)
    assert 0 < imported.report.values < 10
    (lost,) = [name for name in imported.report.skipped if "cut off" in name]
    assert lost.startswith("the last ")
    cut.write_bytes(bytes(range(256)))
    with pytest.raises(ImportProblem, match="holds no scalars"):
        read_logs(cut)


@pytest.fixture
def te_log(tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """The file logger of nvidia-dlfw-inspect itself, which needs no GPU."""
    from nvdlfw_inspect.logging import FileLogger

    logger = FileLogger("nvdlfw_inspect", str(tmp_path))
    logger._initialize_stats_logger("nvdlfw_inspect_statistics_logs")
    folder = tmp_path / "nvdlfw_inspect_statistics_logs"
    yield logger, folder
    statistics = logging.getLogger("Default Statistics")
    for handler in list(statistics.handlers):
        handler.close()
        statistics.removeHandler(handler)


def test_transformer_engine_debug_log(te_log: tuple[Any, Path]) -> None:
    logger, folder = te_log
    layer = "model.layers.3.mlp_fc1"
    for step in (0, 10):
        logger.log_scalar(f"{layer}_activation_cur_amax", 12.5 + step, step)
        logger.log_scalar(f"{layer}_activation_scale_inv_min", 0.0279, step)
        logger.log_scalar(f"{layer}_activation_scale_inv_max", 0.0279, step)
        logger.log_scalar(f"{layer}_activation_underflows%", 1.25, step)
        logger.log_scalar(f"{layer}_gradient_cur_amax", math.inf if step else 3e-5, step)
        logger.log_scalar(f"{layer}_gradient_dynamic_range", 9.0, step)
        logger.log_scalar(f"{layer}_gradient_mean", -0.25, step)
        logger.log_scalar(f"{layer}_weight_mxfp8_mse", math.nan, step)
    imported = read_logs(folder)
    (records,) = attempts(imported)
    assert [r.step for r in records] == [0, 10]
    first = {(t.identity.role, t.identity.format): t for t in records[0].tensors}
    operand = first["input", "e4m3"]
    assert operand.identity.layer == layer
    assert (operand.amax, operand.underflow_ratio) == (12.5, 0.0125)
    assert operand.scale_log2 == pytest.approx(-math.log2(0.0279))
    assert operand.headroom_log2 == pytest.approx(math.log2(448 * 0.0279 / 12.5))
    # Printed as 0.0000: not a measurement of nothing.
    assert ("grad_output", "e5m2") not in first
    assert any(name.startswith("cur_amax") for name in imported.report.skipped)
    assert imported.report.skipped["dynamic_range without a finite amax"] == 2
    later = {t.identity.role: t for t in records[1].tensors}
    assert later["grad_output"].amax == math.inf
    assert [(e.kind, e.layer, e.role) for e in records[1].events] == [
        ("nonfinite", layer, "grad_output")
    ]
    assert records[0].scalars[f"te/{layer}_gradient_mean"] == -0.25
    assert math.isnan(records[0].scalars[f"te/{layer}_weight_mxfp8_mse"])


def test_ranks_of_one_job_are_merged(te_log: tuple[Any, Path]) -> None:
    logger, folder = te_log
    logger.log_scalar("a_activation_cur_amax", 1.0, 0)
    (first,) = folder.glob("*.log")
    other = folder / "nvdlfw_inspect_globalrank-1.log"
    other.write_text(first.read_text().replace("value=1.0000", "value=3.0000"))
    (records,) = attempts(read_logs(folder))
    assert [t.amax for t in records[0].tensors] == [3.0]


CHART = """"Step","big - run - loss","big - run - loss__MIN","big - run - _step","b - loss"
0,3.0,3.0,0,
1,NaN,,1,2
2,2.5,2.0,2,-Infinity
"""
HISTORY = """,_step,_runtime,_timestamp,train/loss,lr,note
0,0,1.5,1700000000.25,2.5,0.001,warm
1,1,2.5,1700000001.25,,0.001,
2,2,3.5,17000"""


def test_a_chart_exported_from_wandb(tmp_path: Path) -> None:
    path = tmp_path / "chart.csv"
    path.write_text(CHART)
    imported = read_logs(path)
    found = {run.name: scalars(run.attempts[0]) for run in imported.runs}
    assert set(found) == {"big - run", "b"}
    assert math.isnan(found["big - run"][1]["loss"])
    assert found["b"] == {1: {"loss": 2.0}, 2: {"loss": -math.inf}}
    assert "big - run - loss__MIN" in imported.report.skipped


def test_a_history_exported_from_wandb(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text(HISTORY)
    imported = read_logs(path)
    (records,) = attempts(imported)
    assert scalars(records) == {
        0: {"loss": 2.5, "learning_rate": 0.001},
        1: {"learning_rate": 0.001},
    }
    assert records[0].time.timestamp() == 1700000000.25
    assert imported.report.format == "wandb"
    left_out = {"the last row, which is cut off", "note (no number)", "_runtime"}
    assert left_out <= set(imported.report.skipped)


TABLE = "step;loss;lr\n1;2,5;1e-3\n2;-inf;\n1000;2,25;1,5e-4\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_other_countries_and_of_excel(
    tmp_path: Path, encoding: str, separator: str
) -> None:
    path = tmp_path / "loss.csv"
    path.write_text(TABLE.replace(";", separator), encoding=encoding)
    imported = read_logs(path)
    (records,) = attempts(imported)
    assert scalars(records) == {
        1: {"loss": 2.5, "learning_rate": 1e-3},
        2: {"loss": -math.inf},
        1000: {"loss": 2.25, "learning_rate": 1.5e-4},
    }
    assert imported.report.notes == ["numbers are written with a decimal comma"]


def test_a_comma_beside_a_point_is_no_decimal_sign(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    path.write_text("step;loss;tokens\n1;2.5;1,024\n")
    imported = read_logs(path)
    (records,) = attempts(imported)
    assert scalars(records) == {1: {"loss": 2.5}}
    assert imported.report.skipped == {"tokens (no number)": 1}


@given(
    st.lists(
        st.tuples(st.integers(0, 2**40), st.floats()), min_size=1, unique_by=lambda row: row[0]
    ),
    st.sampled_from([";", "\t"]),
)
def test_what_is_written_with_decimal_commas_comes_back(
    rows: list[tuple[int, float]], separator: str
) -> None:
    rows = sorted(rows)
    lines = [f"{step}{separator}{value!r}".replace(".", ",") for step, value in rows]
    text = "\n".join([f"step{separator}loss", *lines]) + "\n"
    (records,) = attempts(imported_text("x.csv", text.encode("utf-16")))
    found = {r.step: r.scalars["loss"] for r in records}
    assert all(same(value, found[step]) for step, value in rows)


def test_lines_in_utf16(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text("step 1 loss 2.5\nstep 2 loss 2.0\n", encoding="utf-16")
    (records,) = attempts(read_logs(path, regex=r"step (?P<step>\d+) loss (?P<loss>\S+)"))
    assert scalars(records) == {1: {"loss": 2.5}, 2: {"loss": 2.0}}


def test_json_lines_and_tables_with_several_runs(tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    lines.write_text(
        '{"step": 0, "train": {"loss": 2.0, "ok": true}}\n{"step": 1, "train": {"loss": NaN}}\n{"st'
    )
    imported = read_logs(lines)
    (records,) = attempts(imported)
    assert records[0].scalars == {"loss": 2.0}
    assert math.isnan(records[1].scalars["loss"])
    assert {"train/ok (no number)", "the last line, which is cut off"} <= set(
        imported.report.skipped
    )
    table = tmp_path / "all.parquet"
    pq.write_table(
        pa.table({"trial": ["x", "y", "x"], "it": [0, 0, 1], "Loss": [1.0, math.nan, None]}), table
    )
    found = read_logs(table, chosen=["run=trial", "step=it"])
    assert {run.name: len(run.attempts[0]) for run in found.runs} == {"x": 1, "y": 1}


def test_a_restart_begins_an_attempt_and_a_repeat_does_not(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    path.write_text("step,loss\n0,5\n1,4\n1,4\n2,3\n2,2.5\n1,4.5\n2,2\n")
    imported = read_logs(path)
    assert [scalars(records) for records in attempts(imported)] == [
        {0: {"loss": 5.0}, 1: {"loss": 4.0}, 2: {"loss": 2.5}},
        {1: {"loss": 4.5}, 2: {"loss": 2.0}},
    ]
    assert (imported.report.repeated, imported.report.replaced) == (1, 1)


def test_lines_by_a_regular_expression(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text(
        "starting up\n"
        "iteration 1,000 | lm loss: 2.5E+00 | grad norm: inf |\n"
        "iteration 1,010 | lm loss: nan | grad norm: -1.5 |\n"
        "iteration x | lm loss: 1 | grad norm: 1 |\n"
    )
    imported = read_logs(
        path, regex=r"iteration (?P<step>\S+) \| lm loss: (?P<loss>\S+) \| grad norm: (?P<gn>\S+)",
        chosen=["grad_norm=gn"],
    )  # fmt: skip
    (records,) = attempts(imported)
    assert records[0].scalars == {"loss": 2.5, "grad_norm": math.inf}
    assert math.isnan(records[1].scalars["loss"])
    assert imported.report.skipped == {
        "lines that do not match": 1,
        "lines whose step is no whole number": 1,
    }


finite_or_not = st.floats(allow_nan=True, allow_infinity=True)
rows = st.lists(st.tuples(st.integers(0, 10**9), finite_or_not, finite_or_not), min_size=1)


@given(rows)
def test_what_csv_holds_comes_back(rows: list[tuple[int, float, float]]) -> None:
    """Every number at its step, the later of two at one step."""
    rows = sorted(rows, key=lambda row: row[0])
    sink = io.StringIO()
    csv.writer(sink).writerows([("step", "loss", "gpu"), *rows])
    found = imported_text("x.csv", sink.getvalue())
    expected = {step: (loss, gpu) for step, loss, gpu in rows}
    (records,) = attempts(found)
    assert [r.step for r in records] == sorted(expected)
    for record in records:
        loss, gpu = expected[record.step]
        assert same(record.scalars["loss"], loss)
        assert same(record.scalars["gpu"], gpu)


@given(rows)
def test_what_lines_hold_comes_back(rows: list[tuple[int, float, float]]) -> None:
    rows = sorted({row[0]: row for row in rows}.values())
    text = "".join(f"[rank0] it={s} loss={a!r}, gnorm=({b!r})\nnoise\n" for s, a, b in rows)
    pattern = r"it=(?P<step>\d+) loss=(?P<loss>\S+) gnorm=(?P<grad_norm>\S+)"
    (records,) = attempts(imported_text("x.log", text, pattern))
    found = {r.step: (r.scalars["loss"], r.scalars["grad_norm"]) for r in records}
    assert all(same(a, found[s][0]) and same(b, found[s][1]) for s, a, b in rows)
    assert len(found) == len(rows)


@given(
    st.text() | st.binary(),
    st.sampled_from(
        ["x.csv", "x.log", "trainer_state.json", "x.jsonl", "events.out.tfevents.1", "x"]
    ),
)
def test_whatever_a_file_holds_is_read_or_refused(content: str | bytes, name: str) -> None:
    with contextlib.suppress(ImportProblem):
        assert imported_text(name, content).report.values > 0


def imported_text(name: str, content: str | bytes, regex: str | None = None) -> Imported:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="ignore"))
        return read_logs(path, regex=regex)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "", {}, "is empty"),
        ("a.csv", "step,loss\n", {}, "has no rows"),
        ("a.csv", "x,loss\n1,2\n", {}, "name it with --map step=NAME"),
        ("a.csv", "step,loss\n1,2,3\n2,3\n", {}, "row 2 has 3 cells, not 2"),
        ("a.csv", "step,loss,loss\n1,2,3\n", {}, "stands twice"),
        ("a.csv", "step,loss\n1,2\n", {"chosen": ["loss=Loss"]}, "the log has step, loss"),
        ("a.csv", "step,loss\n1,2\n", {"chosen": ["loss"]}, "write it as NAME=THEIRS"),
        ("a.csv", "step,loss\n-1,2\n", {}, "allowed: 0 or more"),
        ("a.csv", "step,loss\n1.5,2\n", {}, "holds no value"),
        ("a.csv", "step,loss\n1,2\n", {"format": "xml"}, "known: te-debug, hf"),
        ("a.csv", "step,loss\n1,2\n", {"regex": "("}, "--regex"),
        ("a.csv", "step,loss\n1,2\n", {"regex": "(?P<step>.)"}, "needs a group"),
        ("a.csv", "step,loss\n1,2\n", {"regex": "(?P<step>z)(?P<loss>.)"}, "no line matches"),
        ("a.csv", "step,loss\n" + "1,2\n0,3\n" * 70, {}, "go back more than 64 times"),
        ("trainer_state.json", '{"log_history": [{"loss": 1}]}', {}, "no whole step"),
        ("trainer_state.json", '{"log_history": [{"lo', {}, "no log_history of a Trainer"),
        ("a.jsonl", '{"step": 1}\nx\n{}\n', {}, "line 2 is no JSON"),
        ("a.jsonl", "[1, 2]", {}, "a row is no object"),
        ("a.bin", b"\xff\xfe\x00", {}, "is none of"),
        ("a.parquet", b"PAR1 and no more", {}, "not a whole Parquet file"),
        ("absent", None, {}, "cannot read"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: str | bytes | None, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ImportProblem, match=message.replace("(", r"\(")) as refused:
        read_logs(path, **options)
    assert len(str(refused.value).splitlines()) == 1


def test_reports_are_json(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    path.write_text("step,train_loss,x\n0,5,\n1,inf,z\n")
    report = read_logs(path).report
    assert json.loads(json.dumps(report.as_json(), allow_nan=False)) == {
        "values": 2,
        "nonfinite": 1,
        "repeated": 0,
        "replaced": 0,
        "names": {"loss": "train_loss"},
        "left_out": {"x (no number)": 1},
        "notes": [],
    }
