"""`foreshock score`: strangers' files, good and bad."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from foreshock.api.cli.main import app
from foreshock.monitor.record import records_to_table
from tests.api.test_scorer import records


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["score", *map(str, arguments)])


def lines(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def healthy(count: int = 200) -> list[float]:
    rng = np.random.default_rng(0)
    return [2 + 3 * math.exp(-i / 40) + 0.05 * float(rng.standard_normal()) for i in range(count)]


def table(loss: Sequence[object]) -> str:
    return "step,loss\n" + "".join(f"{i},{v}\n" for i, v in enumerate(loss))


def test_a_healthy_log_is_quiet_and_every_row_has_its_line(tmp_path: Path) -> None:
    result = run(write(tmp_path / "a.csv", table(healthy())), "--json")
    assert result.exit_code == 0
    rows = lines(result)
    assert [row["step"] for row in rows] == list(range(200))
    assert set(rows[0]) == {"step", "risk", "state", "kind"}
    assert set(rows[0]["risk"]) == {"10", "100", "1000"}  # type: ignore[call-overload]


def test_a_jump_is_detected_and_the_exit_code_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", table([*healthy(), *[8.0] * 20]))
    result = run(path, "--json")
    assert result.exit_code == 3
    fired = [row for row in lines(result) if row["state"] == "firing"]
    assert fired[0]["kind"] == "detection"
    summary = run(path)
    assert summary.exit_code == 3
    assert "220 rows, 1 attempt(s), 1 alarm(s)" in summary.stdout


@pytest.mark.parametrize("word", ["NaN", "nan", "Inf", "-Infinity", "Infinity", "-inf", "1e999"])
def test_a_lost_loss_fires_at_once(tmp_path: Path, word: str) -> None:
    result = run(write(tmp_path / "a.csv", table([1.0, word, ""])), "--json")
    assert result.exit_code == 3
    assert [row["state"] for row in lines(result)] == ["ok", "firing", "firing"]
    assert lines(result)[1]["kind"] == "detection"


def test_what_real_files_look_like(tmp_path: Path) -> None:
    text = (
        "\ufeff Step , note,loss,grad_norm,lr\r\n"
        '0,"a, b",1.5,, 1e-3\r\n'
        "1.0,, ,NaN,\r\n"
        "\r\n"
        "2e0,x,+1.4,2,0\r\n"
    )
    result = run(write(tmp_path / "a.csv", text), "--json")
    assert result.exit_code == 0, result.stderr
    assert [row["step"] for row in lines(result)] == [0, 1, 2]


def test_attempts_are_scored_apart(tmp_path: Path) -> None:
    text = "step,loss,attempt\n0,1,1\n1,NaN,1\n0,1,2\n1,1,2\n"
    rows = lines(run(write(tmp_path / "a.csv", text), "--json"))
    assert [row["state"] for row in rows] == ["ok", "firing", "ok", "ok"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("step,loss\n", "no rows"),
        ("step\n1\n", "loss is missing"),
        ("a;b\n1;2\n", "step and loss is missing"),
        ("step,loss,loss\n1,2,3\n", "stands twice"),
        ("step,loss,lr,learning_rate\n1,2,3,4\n", "stands twice"),
        ("step,loss\n1,abc\n", "loss is 'abc'"),
        ("step,loss\n1,1_0\n", "loss is '1_0'"),
        ("step,loss,grad_norm\n1,1,x\n", "grad_norm is 'x'"),
        ("step,loss\n,1\n", "step is empty"),
        ("step,loss\n1.5,1\n", "step is 1.5"),
        ("step,loss\n-1,1\n", "step is -1"),
        ("step,loss\nNaN,1\n", "step is nan"),
        ("step,loss\ninf,1\n", "step is inf"),
        ("step,loss\n1e30,1\n", "step is 1e+30"),
        ("step,loss\n1,1\n1,1\n", "steps must rise"),
        ("step,loss\n2,1\n1,1\n", "steps must rise"),
        ("step,loss,attempt\n1,1,1\n1,1,2\n1,1,1\n", "steps must rise"),
        ("step,loss,attempt\n1,1,\n", "attempt is empty"),
        ("step,loss\n1\n", "1 cells"),
        ("step,loss\n1,2,3\n", "3 cells"),
        ('step,loss\n1,"2\n', "not CSV"),
        ("step,loss\n1,2\x00\n", "loss is"),
    ],
)
@pytest.mark.parametrize("json_lines", [True, False])
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, text: str, message: str, json_lines: bool
) -> None:
    result = run(write(tmp_path / "a.csv", text), *(["--json"] if json_lines else []))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent.csv", "No such file"),
        (tmp_path, "is a folder"),
        (write(tmp_path / "b.parquet", "PAR1 and no more"), "not a whole Parquet file"),
        (write(tmp_path / "c.parquet", "step,loss\n1,2\n"), "not a whole Parquet file"),
    ):
        result = run(path)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    (tmp_path / "d.csv").write_bytes("step,loss\n1,2\n".encode("utf-16"))
    assert "not UTF-8" in run(tmp_path / "d.csv").stderr
    assert run(write(tmp_path / "e.csv", table([1.0])), "--prior", "2").exit_code == 2


LOSSES = st.lists(
    st.floats(allow_nan=True, allow_infinity=True, width=32) | st.just(""), min_size=2, max_size=90
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(loss=LOSSES, cut=st.integers(1, 89))
def test_a_line_depends_on_no_later_row(tmp_path: Path, loss: list[object], cut: int) -> None:
    whole = run(write(tmp_path / "whole.csv", table(loss)), "--json")
    part = run(write(tmp_path / "part.csv", table(loss[:cut])), "--json")
    assert whole.exit_code in (0, 3)
    assert len(whole.stdout.splitlines()) == len(loss)
    assert whole.stdout.startswith(part.stdout)
    fired = any(row["state"] == "firing" for row in lines(whole))
    assert whole.exit_code == (3 if fired else 0)


def test_a_long_log_with_a_rise_is_causal_too(tmp_path: Path) -> None:
    loss = healthy(500)
    loss[300:] = [v + (i / 50) for i, v in enumerate(loss[300:])]
    whole = run(write(tmp_path / "whole.csv", table(loss)), "--json").stdout
    part = run(write(tmp_path / "part.csv", table(loss[:400])), "--json").stdout
    assert whole.startswith(part)


def test_parquet_of_records(tmp_path: Path) -> None:
    pq.write_table(records_to_table(records(70)), tmp_path / "a.parquet")
    result = run(tmp_path / "a.parquet", "--json")
    assert result.exit_code in (0, 3), result.stderr
    assert len(lines(result)) == 70


def test_parquet_of_columns_is_read_as_csv_is(tmp_path: Path) -> None:
    loss = [*healthy(60), math.nan]
    columns = {"step": np.arange(61), "loss": np.array(loss), "lr": np.full(61, 1e-3)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    flat = run(tmp_path / "a.parquet", "--json")
    assert flat.stdout == run(write(tmp_path / "a.csv", table(loss)), "--json").stdout
    for broken, message in (
        ({"step": [1]}, "loss is missing"),
        ({"step": [1], "loss": ["x"]}, "no numbers"),
        ({"step": [1, None], "loss": [1.0, 1.0]}, "step is empty"),
        ({"step": pa.array([], pa.int64()), "loss": pa.array([], pa.float64())}, "no rows"),
    ):
        pq.write_table(pa.table(broken), tmp_path / "b.parquet")
        result = run(tmp_path / "b.parquet")
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_picture_is_drawn_when_asked_for_and_never_into_a_pipe(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", table([*healthy(), *[8.0] * 20]))
    plain, drawn = run(path), run(path, "--picture")
    assert drawn.exit_code == plain.exit_code == 3
    assert drawn.stdout.startswith(plain.stdout)
    picture = drawn.stdout.removeprefix(plain.stdout).splitlines()
    assert picture[0] == "loss"
    assert picture[1].split()[0] == "8"
    alarm = next(line for line in picture if line.lstrip().startswith("alarm"))
    assert alarm.endswith("▲")
    assert picture[-1].split() == ["step", "0", "219"]
