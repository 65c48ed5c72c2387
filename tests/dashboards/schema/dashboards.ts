// The types that a dashboard's JSON must have: Grafana's published schema, as JSON writes it.
import type * as board from '@grafana/schema/dist/types/raw/dashboard/x/dashboard_types.gen.d.ts';
import type * as heatmap from '@grafana/schema/dist/types/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen.d.ts';
import type * as stat from '@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts';
import type * as stateTimeline from '@grafana/schema/dist/types/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen.d.ts';
import type * as table from '@grafana/schema/dist/types/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen.d.ts';
import type * as text from '@grafana/schema/dist/types/raw/composable/text/panelcfg/x/TextPanelCfg_types.gen.d.ts';
import type * as timeSeries from '@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts';
import type * as trend from '@grafana/schema/dist/types/raw/composable/trend/panelcfg/x/TrendPanelCfg_types.gen.d.ts';
import type { TableFieldOptions } from '@grafana/schema';

// JSON holds the values of string enums, not their names.
type Json<T> = unknown extends T
  ? T
  : T extends string
    ? `${T}`
    : T extends number | boolean | null | undefined
      ? T
      : T extends (infer E)[]
        ? Json<E>[]
        : { [K in keyof T]: Json<T[K]> };

type FieldConfig<Custom> = {
  defaults: Omit<Json<board.FieldConfig>, 'custom'> & { custom?: Json<Custom> };
  overrides: Json<board.FieldConfigSource['overrides']>;
};

type PanelOf<Type extends string, Options, Custom> = Omit<
  Json<board.Panel>,
  'type' | 'options' | 'fieldConfig'
> & {
  type: Type;
  options: Json<Options>;
  fieldConfig?: FieldConfig<Custom>;
};

type Nothing = Record<string, never>;

export type Panel =
  | PanelOf<'heatmap', heatmap.Options, heatmap.FieldConfig>
  | PanelOf<'stat', stat.Options, Nothing>
  | PanelOf<'state-timeline', stateTimeline.Options, stateTimeline.FieldConfig>
  | PanelOf<'table', table.Options, TableFieldOptions>
  | PanelOf<'text', text.Options, Nothing>
  | PanelOf<'timeseries', timeSeries.Options, timeSeries.FieldConfig>
  | PanelOf<'trend', trend.Options, trend.FieldConfig>;

export type Row = Omit<Json<board.RowPanel>, 'panels'> & { panels: Panel[] };

// What the Prometheus data source reads of a mark stands beside the schema's own members.
type Annotation = Json<board.AnnotationQuery> & {
  expr: string;
  titleFormat: string;
  textFormat: string;
  tagKeys: string;
  step: string;
  useValueForTime?: boolean;
};

// `definition` is what the list of variables shows of a query; the schema leaves it out.
type Variable = Json<board.VariableModel> & { definition?: string };

export type Dashboard = Omit<
  Json<board.Dashboard>,
  'panels' | 'annotations' | 'templating'
> & {
  panels: (Panel | Row)[];
  annotations?: { list?: Annotation[] };
  templating: { list: Variable[] };
};
