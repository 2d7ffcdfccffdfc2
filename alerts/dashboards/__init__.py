"""The Grafana dashboards as tables of panels, which `python -m alerts dashboards` converts to JSON."""
