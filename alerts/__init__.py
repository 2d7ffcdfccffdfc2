"""Alert rules, Alertmanager configuration, Grafana dashboards, and the alert history."""
