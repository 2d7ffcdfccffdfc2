"""Grafana's dashboards, as tables of panels: `python -m alerts dashboards` writes them as JSON."""
