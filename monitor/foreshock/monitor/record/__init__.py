"""The record: the one thing that monitor, trainer, service and forecaster share.

One row per logged step, one Arrow schema everywhere. null = not measured, NaN and infinities =
measured. Knows no torch, no HTTP and no other part of foreshock but the table of formats.
"""

from foreshock.monitor.record.convert import (
    IdentityColumns,
    PlainColumns,
    StatisticColumns,
    flatten_tensors,
    read_stream,
    record_batch,
    records_to_table,
    table_to_records,
    write_stream,
)
from foreshock.monitor.record.jsonio import (
    decode_number,
    encode_number,
    json_to_table,
    records_from_json,
    records_to_json,
)
from foreshock.monitor.record.model import (
    EVENT_KINDS,
    INTEGER_STATISTICS,
    ROLES,
    SCHEMA_VERSION,
    SOURCES,
    STATISTICS,
    Event,
    RecordError,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
)
from foreshock.monitor.record.reports import (
    Held,
    Place,
    ReportError,
    StepReport,
    compress,
    decode_reports,
    encode_reports,
)
from foreshock.monitor.record.risk import HORIZONS, AlertState, Driver, Risk, RiskKind, Suspect
from foreshock.monitor.record.schema import SCHEMA, TENSOR_TYPE, conform, validate
from foreshock.monitor.record.sums import EXPONENTS, FIELD_REDUCTIONS, TensorSums

__all__ = [
    "EVENT_KINDS",
    "EXPONENTS",
    "FIELD_REDUCTIONS",
    "HORIZONS",
    "INTEGER_STATISTICS",
    "ROLES",
    "SCHEMA",
    "SCHEMA_VERSION",
    "SOURCES",
    "STATISTICS",
    "TENSOR_TYPE",
    "AlertState",
    "Driver",
    "Event",
    "Held",
    "IdentityColumns",
    "Place",
    "PlainColumns",
    "RecordError",
    "ReportError",
    "Risk",
    "RiskKind",
    "StatisticColumns",
    "StepRecord",
    "StepReport",
    "Suspect",
    "TensorIdentity",
    "TensorStatistics",
    "TensorSums",
    "compress",
    "conform",
    "decode_number",
    "decode_reports",
    "encode_number",
    "encode_reports",
    "flatten_tensors",
    "json_to_table",
    "read_stream",
    "record_batch",
    "records_from_json",
    "records_to_json",
    "records_to_table",
    "table_to_records",
    "validate",
    "write_stream",
]
