"""Templates for Alertmanager's receivers: the service's words, where they came with the alert."""

from __future__ import annotations

from typing import Final

__all__ = ["TEMPLATE"]

TEMPLATE: Final = """{{/* Written by `make dashboards`. In a receiver, for example:
  slack_configs:
  - channel: '#training'
    title: '{{ template "foreshock.title" . }}'
    text: '{{ template "foreshock.text" . }}'
  pagerduty_configs:
  - description: '{{ template "foreshock.title" . }}'
  email_configs:
  - headers: {Subject: '{{ template "foreshock.title" . }}'}
    html: '{{ template "foreshock.html" . }}'
    text: '{{ template "foreshock.text" . }}'
*/}}
{{ define "foreshock.headline" -}}
{{ with .Annotations.headline }}{{ . }}{{ else }}{{ .Annotations.summary }}{{ end }}
{{- end }}

{{ define "foreshock.title" -}}
[{{ .Status }}] {{ template "foreshock.headline" (index .Alerts 0) }}
{{- if gt (len .Alerts) 1 }} (and {{ len (slice .Alerts 1) }} more){{ end }}
{{- end }}

{{ define "foreshock.text" -}}
{{ range .Alerts -}}
{{ template "foreshock.headline" . }}
{{ .Annotations.description }}
{{- if .Annotations.link }}
Page: {{ .Annotations.link }}{{ end }}
Runbook: {{ .Annotations.runbook_url }}

{{ end }}
{{- end }}

{{ define "foreshock.html" -}}
{{ range .Alerts -}}
<h3>{{ template "foreshock.headline" . }}</h3>
<p style="white-space:pre-line">{{ .Annotations.description }}</p>
<p>{{ if .Annotations.link }}<a href="{{ .Annotations.link }}">Open the run</a> &nbsp; {{ end }}
<a href="{{ .Annotations.runbook_url }}">Runbook</a></p>
{{ end }}
{{- end }}
"""
