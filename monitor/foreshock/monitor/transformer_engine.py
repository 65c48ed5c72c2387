"""Transformer Engine's debug mode: our feature in it, and its own statistics as records.

The one module, beside the feature itself, that needs nvdlfw_inspect; import it where Transformer
Engine is installed. Watching its layers without debug mode needs none of this: `watch` does.

    from foreshock.monitor.transformer_engine import te_debug
    te_debug(freq=10)            # before the first layer of the model is built
    model = te.TransformerLayer(...)
    w = watch(model, optimizer, run="...")
"""

from __future__ import annotations

import importlib.util
import queue
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from nvdlfw_inspect import api as debug_api
from nvdlfw_inspect.logging import BaseLogger

from foreshock.monitor.containment import Containment
from foreshock.monitor.record import SCHEMA, records_to_table
from foreshock.monitor.sinks import ClosableSink, Sink
from foreshock.monitor.te_records import te_record
from foreshock.monitor.transfer import Packed, pack

if TYPE_CHECKING:
    from foreshock.monitor.session import Watch

__all__ = ["TEStatsLogger", "end_te_debug", "te_debug"]

_FEATURES: Final = Path(__file__).with_name("te_features")
_WAITING_STEPS: Final = 64


def te_debug(
    *,
    freq: int = 10,
    layers: str = ".*",
    tensors: Sequence[str] = ("activation", "weight", "gradient"),
    features: Mapping[str, Mapping[str, object]] | None = None,
    statistics_logger: BaseLogger | None = None,
    log_dir: Path | str | None = None,
    first_step: int = 0,
) -> None:
    """Switch Transformer Engine's debug mode on, with our statistics of the exact operands.

    At an exact step every layer runs unfused and its GEMMs' operands pass through our feature; a
    watch on the model turns them into records and counts debug mode's steps. Between exact steps
    layers run as always.

    Args:
        freq: Steps from one exact step to the next; a multiple of the watch's tensor_every, since
            steps without tensor statistics have no exact ones either. 0 switches only `features`
            on.
        layers: Regular expression over Transformer Engine's layer names.
        tensors: Which operands: activation, weight, gradient.
        features: Further debug features with their settings, e.g. LogTensorStats.
        statistics_logger: Takes what these log; None keeps a file in log_dir.
        log_dir: For the library's own log files; None takes a temporary folder.
        first_step: Number of the next optimizer step.

    Raises:
        RuntimeError: It is on already, or a layer was built before, which would not take part.
        ValueError: A value is not allowed.
    """
    if freq < 0:
        raise ValueError(f"freq is {freq}; allowed: 0 or more")
    if freq == 0 and not features:
        raise ValueError("freq is 0 and features is empty; nothing would be switched on")
    if debug_api.DEBUG_MANAGER is not None:
        raise RuntimeError("debug mode is on already; call end_te_debug() first")
    if _built_before():
        raise RuntimeError(
            "a Transformer Engine layer was built before te_debug(), and would not take part; call "
            "te_debug() before the model is built"
        )
    chosen: dict[str, object] = {name: dict(options) for name, options in (features or {}).items()}
    if freq:
        ours = {"enabled": True, "tensors": list(tensors), "freq": freq}
        chosen["ForeshockStatistics"] = ours
    # One section: two that match the same layer are refused.
    section = {
        "enabled": True,
        "layers": {"layer_name_regex_pattern": layers},
        "transformer_engine": chosen,
    }
    debug_api.initialize(
        config_file={"foreshock": section},
        feature_dirs=[str(_library_features()), str(_FEATURES)],
        statistics_logger=statistics_logger,
        log_dir=str(log_dir if log_dir is not None else tempfile.mkdtemp(prefix="te-debug-")),
        init_training_step=first_step,
    )


def end_te_debug() -> None:
    """Switch debug mode off; layers built while it was on need it and cannot run any more."""
    debug_api.end_debug()


def _built_before() -> bool:
    module = sys.modules.get("transformer_engine.debug.pytorch.debug_state")
    # None before the first layer, afterwards whether debug mode was on when it was built.
    return module is not None and module.TEDebugState.debug_enabled is False


def _library_features() -> Path:
    spec = importlib.util.find_spec("transformer_engine")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        folder = Path(place) / "debug" / "features"
        if folder.is_dir():
            return folder
    raise RuntimeError("Transformer Engine with debug features (2.0 or later) is not installed")


@dataclass(frozen=True, slots=True)
class _Logged:
    """One debug iteration on its way to the thread that makes records."""

    iteration: int
    time: datetime
    names: tuple[str, ...]
    values: tuple[float | None, ...]
    packed: Packed


class TEStatsLogger(BaseLogger):  # type: ignore[misc]
    """Every statistic that Transformer Engine's debug features log, without waiting for the device.

    With a watch they become scalars of its records, under te/ and their own names. Without one,
    each step becomes a record of its own, tensors by their roles, in a thread of its own.

    Args:
        watch: Whose records they join; see `join`.
        sinks: Called with every record, without a watch.
        formats: Format by role of a record; left out, those of the HYBRID recipe.
        names: Names of layers in records by Transformer Engine's; left out, the same.

    Attributes:
        guards: Count failures, in the training thread and in the one that makes records.
    """

    def __init__(
        self,
        watch: Watch | None = None,
        *,
        sinks: Sequence[Sink] = (),
        formats: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.guards = (Containment("Transformer Engine statistics"), Containment("its records"))
        self._watch = watch
        self._sinks = tuple(sinks)
        self._formats, self._names = formats, names
        self._iteration: int | None = None
        self._buffer: list[tuple[str, torch.Tensor | float]] = []
        self._closed = False
        self._queue: queue.Queue[_Logged | threading.Event | None] = queue.Queue(_WAITING_STEPS)
        self._thread: threading.Thread | None = None
        if watch is None:
            self._thread = threading.Thread(
                target=self._run, name="foreshock-te-statistics", daemon=True
            )
            self._thread.start()

    def join(self, watch: Watch) -> None:
        """Take part in a watch: debug mode is on before the model is built, and it after."""
        self._watch = watch

    def log_scalar(
        self, name: str, value: torch.Tensor | float, iteration: int, **_: object
    ) -> None:
        """Take one statistic; called by the library when a debug iteration has ended."""
        with self.guards[0]:
            value = value.detach() if isinstance(value, torch.Tensor) else float(value)
            if self._watch is not None:
                self._watch.log(**{f"te/{name}": value})
                return
            if self._iteration is not None and iteration != self._iteration:
                self._hand_over()
            self._iteration = iteration
            self._buffer.append((name, value))

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything logged so far has reached every sink; False on time-out."""
        if self._thread is None or self._closed:
            return True
        with self.guards[0]:
            self._hand_over()
        done = threading.Event()
        try:
            self._queue.put(done, timeout=timeout)
        except queue.Full:
            return False
        return done.wait(timeout)

    def close(self, timeout: float = 10.0) -> bool:
        """Flush, and close the sinks."""
        done = self.flush(timeout)
        if self._thread is not None and not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join(timeout)
            for sink in self._sinks:
                if isinstance(sink, ClosableSink):
                    with self.guards[0]:
                        sink.close()
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _hand_over(self) -> None:
        buffer, self._buffer = self._buffer, []
        if not buffer or self._iteration is None:
            return
        tensors = [value.reshape(()) for _, value in buffer if isinstance(value, torch.Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        logged = _Logged(
            iteration=self._iteration,
            time=datetime.now(UTC),
            names=tuple(name for name, _ in buffer),
            values=tuple(None if isinstance(v, torch.Tensor) else v for _, v in buffer),
            packed=pack({"values": tensors}, device),
        )
        try:
            self._queue.put_nowait(logged)
        except queue.Full:
            raise RuntimeError(
                f"the statistics of iteration {logged.iteration} are dropped: the thread that "
                f"makes records is {_WAITING_STEPS} steps behind"
            ) from None

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, threading.Event):
                item.set()
                continue
            with self.guards[1]:
                self._publish(item)

    def _publish(self, logged: _Logged) -> None:
        arrays: Mapping[str, Any] = logged.packed.arrays()
        copied = iter(arrays["values"].tolist())
        values = [next(copied) if value is None else value for value in logged.values]
        record = te_record(
            zip(logged.names, values, strict=True),
            step=logged.iteration,
            time=logged.time,
            formats=self._formats,
            names=self._names,
        )
        for batch in records_to_table([record]).cast(SCHEMA).to_batches():
            for sink in self._sinks:
                sink(batch)
