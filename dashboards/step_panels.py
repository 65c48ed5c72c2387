"""Kinds of panels on a step axis, and the reads of the service that they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from dashboards.infinity import INFINITY, Column, Read, joined, matrix
from dashboards.parts import NUMERICS, organize, run_link
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard, heatmap, table, trend
from grafana_foundation_sdk.cog import builder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode

from foreshock.api.store import SMALLEST_IS_WORST

__all__ = [
    "RUN_PATH",
    "STEP",
    "STEPS",
    "Heatmap",
    "Listing",
    "Trend",
    "layer_series",
    "newest",
    "scalar",
]

RUN_PATH: Final = "/runs/${run:percentencode}"
STEPS: Final = {
    "project": "${project}",
    "first_step": "${first_step}",
    "last_step": "${last_step}",
}
"""Parameters of reads over steps."""

STEP: Final = Column("step", "step")


def scalar(name: str, text: str) -> Read:
    """One scalar by step: smallest, mean and largest of each bucket."""
    return Read(
        path=f"{RUN_PATH}/series",
        parameters={**STEPS, "name": name, "points": "1000"},
        columns=(STEP, Column("min", "smallest"), Column("mean", text), Column("max", "largest")),
    )


def layer_series(statistic: str, role: str, text: str, number_format: str = "") -> Read:
    """A statistic of the chosen layer by step; the mean of each bucket."""
    chosen = {"layer": "${layer}", "role": role, "statistic": statistic, "points": "1000"}
    if number_format:
        chosen["format"] = number_format
    return Read(
        path=f"{RUN_PATH}/series",
        parameters={**STEPS, **chosen},
        columns=(STEP, Column("mean", text)),
    )


def newest(statistic: str, role: str, columns: tuple[Column, ...], limit: int) -> Read:
    """Tensors as measured last, those worst in a statistic first."""
    return Read(
        path=f"{RUN_PATH}/tensors",
        parameters={**STEPS, "statistic": statistic, "role": role, "limit": str(limit)},
        columns=columns,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend(builder.Builder[models.Panel]):
    """Lines on a step axis.

    Attributes:
        title: Its name, unique in its dashboard.
        description: What it shows and how to read it.
        unit: As Grafana knows it.
        reads: Its queries, joined by step.
        width: Of 24 columns.
        points: Draw points, where the space between two values means nothing.
        band: Fill between the fields `smallest` and `largest`.
    """

    title: str
    description: str
    unit: str
    reads: tuple[Read, ...]
    width: int = 8
    points: bool = False
    band: bool = False

    def build(self) -> models.Panel:
        """The panel."""
        mode = common.VisibilityMode.ALWAYS if self.points else common.VisibilityMode.NEVER
        panel = trend.Panel().x_field("step").line_width(0 if self.points else 2).show_points(mode)
        # Joined fields would carry the name of their query.
        panel = panel.display_name("${__field.name}")
        panel = panel.tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
        )
        panel = panel.span_nulls(True)
        if len(self.reads) > 1:
            panel = panel.transformations([_transformation(joined("step"))])
        if self.band:
            panel = panel.override_by_name("largest", _properties(fillBelowTo="smallest"))
            panel = panel.override_by_regexp(
                "/^(smallest|largest)$/", _properties(lineWidth=0, fillOpacity=15)
            )
        return _finished(panel, self, height=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap(builder.Builder[models.Panel]):
    """Layers in model order by steps; the bad end of the scale is bright.

    Attributes (others as for `Trend`):
        statistic: What is shown, the worst of each layer and bucket of steps.
        role: Of the tensors.
        number_format: One that is not the run's own.
    """

    title: str
    description: str
    unit: str
    statistic: str
    role: str = "${role}"
    number_format: str = ""
    width: int = 12

    @property
    def reads(self) -> tuple[Read, ...]:
        """Its query."""
        chosen = {"statistic": self.statistic, "role": self.role, "points": "200"}
        if self.number_format:
            chosen["format"] = self.number_format
        columns = (Column("layer", "layer", "string"), STEP, Column("value", "value"))
        return (Read(path=f"{RUN_PATH}/heatmap", parameters={**STEPS, **chosen}, columns=columns),)

    def build(self) -> models.Panel:
        """The panel."""
        made = matrix("step", "layer", "value", numeric_rows=True)
        # Cividis reads alike for every kind of colour vision.
        colour = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Cividis")
        colour = colour.reverse(self.statistic in SMALLEST_IS_WORST).steps(64)
        panel = (
            heatmap.Panel()
            .calculate(False)
            .color(colour)
            .cell_gap(0)
            # The panel's own default hides zeros and everything below.
            .filter_values(heatmap.FilterValueRange().le(-1e300))
            .cell_values(heatmap.CellValues().unit(self.unit))
            .y_axis(heatmap.YAxisConfig().reverse(True).axis_placement(common.AxisPlacement.LEFT))
            .show_legend()
            .transformations([_transformation(each) for each in made])
        )
        return _finished(panel, self, height=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing(builder.Builder[models.Panel]):
    """Rows as the service lists them.

    Attributes (others as for `Trend`):
        transformations: After the query.
        layer: Name of the column that leads to the layer it names.
        units: Of columns with another one.
    """

    title: str
    description: str
    unit: str
    reads: tuple[Read, ...]
    width: int = 12
    layer: str = ""
    units: tuple[tuple[str, str], ...] = ()
    transformations: tuple[dict[str, Any], ...] = field(default_factory=tuple)

    def build(self) -> models.Panel:
        """The panel."""
        # Infinity sorts columns by name.
        order = organize({column.text: column.text for column in self.reads[0].columns})
        made = [_transformation(each) for each in self.transformations] or [order]
        panel = table.Panel().filterable(True).cell_options(common.TableAutoCellOptions())
        panel = panel.transformations(made)
        if self.layer:
            panel = panel.override_by_name(
                self.layer, [models.DynamicConfigValue("links", [_to_layer().build()])]
            )
        for name, unit in self.units:
            panel = panel.override_by_name(name, [models.DynamicConfigValue("unit", unit)])
        return _finished(panel, self, height=9)


def _to_layer() -> dashboard.DashboardLink:
    # The field is the one that was clicked, whatever its column is called.
    return run_link("Panels of this layer", NUMERICS, "${", "&var-layer=${__value.text}")


def _properties(**custom: Any) -> list[models.DynamicConfigValue]:
    return [models.DynamicConfigValue(f"custom.{name}", value) for name, value in custom.items()]


def _transformation(made: dict[str, Any]) -> models.DataTransformerConfig:
    return models.DataTransformerConfig(id_val=made["id"], options=made["options"])


def _finished(panel: Any, of: Trend | Heatmap | Listing, *, height: int) -> models.Panel:
    panel = panel.title(of.title).description(of.description).unit(of.unit)
    panel = panel.datasource(INFINITY).height(height).span(of.width)
    panel = panel.targets([read.builder(place) for place, read in enumerate(of.reads)])
    built: models.Panel = panel.build()
    return built
