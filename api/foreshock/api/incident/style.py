"""The style sheet of an incident page, and the policy that forbids it everything else."""

from __future__ import annotations

from typing import Final

__all__ = ["POLICY", "STYLE"]

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
"""No script whatever: nothing in a name or an event can run, should one slip through."""

STYLE: Final = """
:root{color-scheme:light;--ink:#1c2430;--quiet:#5b6675;--line:#d9dee6;--bad:#b91c1c}
body{margin:0;background:#f4f6f9;color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:0 0 10px}h3{font-size:15px;margin:14px 0 4px}
section{background:#fff;border:1px solid var(--line);border-radius:8px;padding:18px;margin:16px 0}
p,dd{overflow-wrap:anywhere}.quiet{color:var(--quiet)}.state{font-weight:600}
.firing{color:var(--bad)}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--line);
vertical-align:top}td:first-child,td:last-child{overflow-wrap:anywhere}th{white-space:nowrap}
td.n{text-align:right;white-space:nowrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;margin:0}dd{margin:0}
dt{color:var(--quiet)}svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,sans-serif;fill:var(--quiet)}svg .end{text-anchor:end}
svg .mid{text-anchor:middle}svg .grid{stroke:#eceff3}svg .asked{stroke:#111;stroke-dasharray:4 3}
svg .alarm{stroke:var(--bad);stroke-width:1.5}svg .saved{stroke:#15803d}
svg .event{stroke:#9aa4b2;stroke-dasharray:2 3}svg .lost{stroke:var(--bad);stroke-width:2}
.heat{position:relative;border:1px solid var(--line);line-height:0}
.heat img{width:100%;min-height:60px;image-rendering:pixelated}
.heat i{position:absolute;top:0;bottom:0;border-left:2px dashed #111}
.key span{display:inline-block;margin-right:14px}.key b{display:inline-block;width:14px;height:3px;
vertical-align:middle;margin-right:5px}code,pre{font:13px ui-monospace,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;max-height:320px;overflow:auto}
summary{cursor:pointer;padding:4px 0}details details{margin-left:10px}
.cause{border-left:4px solid #1f5fbf;padding-left:12px;margin:12px 0}
"""
