"""Alert rules for Prometheus and a dashboard for Grafana, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_BY = "sum by (model_name)"


def _rate(name: str) -> str:
    return f'{_BY} (rate({name}{{model_name=~"$model_name"}}[$__rate_interval]))'


def _ratio(top: str, bottom: str) -> str:
    return f"{_rate(top)} / ({_rate(bottom)} > 0)"


_S = "outrider_spec_decode_"
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Tokens per second", "short", ((_rate("outrider_tokens_total"), "{{model_name}}"),)),
    (
        "Acceptance length (tokens per step)",
        "short",
        ((_ratio("outrider_tokens_total", "outrider_sequence_steps_total"), "{{model_name}}"),),
    ),
    (
        "Rejections per judged token",
        "percentunit",
        (
            (_ratio(f"{_S}rejections_total", f"{_S}judged_tokens_total"), "observed {{model_name}}"),
            (_ratio(f"{_S}predicted_rejections_total", f"{_S}judged_tokens_total"), "predicted {{model_name}}"),
            (f'{_S}break_even_rejection_probability{{model_name=~"$model_name"}}', "break-even {{model_name}}"),
        ),
    ),
    (
        "Conditional acceptance by position",
        "percentunit",
        (
            (
                f"sum by (position) (rate({_S}accepted_tokens_per_position_total[$__rate_interval])) / "
                f"(sum by (position) (rate({_S}judged_tokens_total[$__rate_interval])) > 0)",
                "position {{position}}",
            ),
        ),
    ),
    (
        "Seconds by phase",
        "s",
        (("sum by (phase) (rate(outrider_phase_seconds_total[$__rate_interval]))", "{{phase}}"),),
    ),
    (
        "Draft length and estimated speed-up",
        "short",
        ((f"{_S}length", "length {{model_name}}"), (f"{_S}speedup_ratio_estimate", "speed-up {{model_name}}")),
    ),
    (
        "Running and waiting",
        "short",
        (("vllm:num_requests_running", "running"), ("vllm:num_requests_waiting", "waiting")),
    ),
    (
        "Time to first token",
        "s",
        tuple(
            (
                f"histogram_quantile({q}, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket[$__rate_interval])))",
                f"p{round(100 * q)}",
            )
            for q in (0.5, 0.9, 0.99)
        ),
    ),
    (
        "Evidence against exactness (log; alarm at 13.8) and change detector (alarm at 20.7)",
        "short",
        (
            ("outrider_exactness_log_evalue", "evidence {{model_name}}"),
            ("outrider_residual_log_detector", "detector {{model_name}}"),
        ),
    ),
    ("Dollars per million tokens", "currencyUSD", (("outrider_cost_dollars_per_million_tokens", "{{model_name}}"),)),
    (
        "Memory and cache",
        "percentunit",
        (
            ("outrider_kv_cache_usage_ratio", "cache {{model_name}}"),
            ("rate(process_cpu_seconds_total[$__rate_interval])", "cores busy {{instance}}"),
        ),
    ),
    ("Built-in alerts", "short", (("outrider_alert_firing > 0", "{{alert}}"),)),
    (
        "Refused requests",
        "short",
        (("sum by (reason) (rate(outrider_requests_refused_total[$__rate_interval]))", "{{reason}}"),),
    ),
)
"""Title, unit, and the queries with their legends."""


def grafana() -> dict[str, Any]:
    """The dashboard in Grafana's classic JSON, which every version imports."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = [
        {
            "id": n + 1,
            "title": title,
            "type": "timeseries",
            "datasource": source,
            "gridPos": {"x": 8 * (n % 3), "y": 8 * (n // 3), "w": 8, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [
                {"refId": chr(65 + i), "expr": query, "legendFormat": legend, "datasource": source}
                for i, (query, legend) in enumerate(queries)
            ],
        }
        for n, (title, unit, queries) in enumerate(PANELS)
    ]
    model = {"name": "model_name", "type": "query", "datasource": source, "includeAll": True, "allValue": ".*"}
    model |= {"query": "label_values(outrider_tokens_total, model_name)", "refresh": 2, "multi": True}
    return {
        "id": None,
        "uid": "outrider-serve",
        "title": "Outrider",
        "tags": ["outrider", "vllm"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}, model]},
        "panels": panels,
        "annotations": {
            "list": [
                {
                    "name": "Built-in alerts",
                    "datasource": source,
                    "enable": True,
                    "iconColor": "red",
                    "expr": "outrider_alert_firing > 0",
                    "titleFormat": "{{alert}}",
                    "step": "60s",
                }
            ]
        },
    }


def export(folder: Path) -> list[Path]:
    """Write the alert rules, their tests and the dashboard to `folder`; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    out: list[Path] = []
    for name in ("alerts.yml", "alerts.test.yml"):
        out.append(folder / name)
        out[-1].write_text((HERE / name).read_text(encoding="utf-8"), encoding="utf-8")
    out.append(folder / "grafana.json")
    out[-1].write_text(json.dumps(grafana(), indent=2) + "\n", encoding="utf-8")
    return out
